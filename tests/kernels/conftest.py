"""A random GRPO problem, and the losses written once more with loops, by hand from the papers."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcorl_kernels import chunking


def _make_problem(seed=0, lengths=(4, 0, 1, 6), hidden_size=5, vocabulary=11, masked=True, dtype=torch.float64):
    """Ratios fall on both sides of the clip, advantages have both signs, and one sequence is empty."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(n, hidden_size), normal(vocabulary, hidden_size), normal(vocabulary)
    token_ids = torch.randint(0, vocabulary, (n,), generator=g)
    own = torch.log_softmax((hidden @ weight.t() + bias) / 0.7, -1).gather(1, token_ids[:, None]).squeeze(1)
    mask = torch.rand(n, generator=g) > 0.3 if masked else None
    return SimpleNamespace(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=bias.requires_grad_(),
        token_ids=token_ids,
        advantages=normal(len(lengths)),
        row_advantages=normal(n),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        old_log_probs=own + 0.4 * normal(n),
        ref_log_probs=own + 0.4 * normal(n),
        mask=mask,
    )


def _loop_grpo_loss(
    logits,
    token_ids,
    advantages,
    cu_seqlens,
    old_log_probs=None,
    ref_log_probs=None,
    mask=None,
    temperature=1.0,
    beta=0.0,
    eps_low=0.2,
    eps_high=0.2,
    delta=None,
    loss_type="grpo",
    importance="token",
    normalizer=None,
):
    """One row at a time, by autograd; finite inputs only."""
    bounds = cu_seqlens.tolist()
    sequences, count = [], 0
    for start, stop in pairwise(bounds):
        rows = [i for i in range(start, stop) if mask is None or mask[i]]
        count += len(rows)
        log_probs = [torch.log_softmax(logits[i] / temperature, 0)[token_ids[i]] for i in rows]
        old = [
            lp.detach() if old_log_probs is None else old_log_probs[i] for lp, i in zip(log_probs, rows, strict=True)
        ]
        ratios = [torch.exp(lp - o) for lp, o in zip(log_probs, old, strict=True)]
        if importance == "sequence" and rows:
            mean = sum(lp - o for lp, o in zip(log_probs, old, strict=True)) / len(rows)
            ratios = [torch.exp(mean)] * len(rows)
        losses = []
        for i, lp, ratio in zip(rows, log_probs, ratios, strict=True):
            advantage = advantages[len(sequences)] if len(advantages) == len(bounds) - 1 else advantages[i]
            if loss_type == "cispo":
                loss = -min(ratio.item(), 1 + eps_high) * advantage * lp
            else:
                first = ratio if delta is None or ratio <= delta else torch.tensor(delta, dtype=ratio.dtype)
                loss = -first * advantage
                if eps_low is not None:
                    loss = torch.maximum(loss, -torch.clamp(ratio, 1 - eps_low, 1 + eps_high) * advantage)
            if beta:
                gap = ref_log_probs[i] - lp
                loss = loss + beta * (torch.exp(gap) - gap - 1)
            losses.append(loss)
        sequences.append(losses)
    zero = logits.sum() * 0
    if loss_type == "grpo":
        means = [sum(losses) / len(losses) if losses else zero for losses in sequences]
        return sum(means, zero) / (normalizer or len(means))
    total = sum((loss for losses in sequences for loss in losses), zero)
    return total / (normalizer or max(count, 1))


class _Recorder(TorchDispatchMode):
    """The largest tensor any operation made, and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        # Inference mode does not take matmul apart.
        self.products += function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_, aten.matmul)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.fixture
def record_operations():
    """``with record_operations() as record`` counts ``record.products`` and keeps ``record.largest``."""
    return _Recorder


@pytest.fixture
def make_problem():
    return _make_problem


@pytest.fixture
def loop_grpo_loss():
    return _loop_grpo_loss


@pytest.fixture
def set_chunk_rows(monkeypatch):
    """``set_chunk_rows(rows, vocabulary)`` makes the linear ops work on that many rows at a time."""

    def set_rows(rows, vocabulary):
        monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", rows * vocabulary)
        monkeypatch.setattr(chunking, "CHUNK_ROWS", 1)

    return set_rows


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request):
    """Where Triton runs: under its interpreter, or compiled; a machine with a GPU does the latter only."""
    pytest.importorskip("triton")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles here; the cuda case runs")
    return request.param


@pytest.fixture(params=["whole rows", "tiles"])
def tiling(request, monkeypatch):
    """Rows in registers, or walked in tiles of 16, the last of them partly outside of the row."""
    if request.param == "tiles":
        from fastcorl_kernels.grpo import triton_kernels as losses
        from fastcorl_kernels.log_softmax import triton_kernels as rows

        monkeypatch.setattr(rows, "MAX_TILE", 16)
        monkeypatch.setattr(losses, "WHOLE_ROW", 1)
    return request.param


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # on CUDA a cumulative sum has no such algorithm
    yield
    torch.use_deterministic_algorithms(False)
