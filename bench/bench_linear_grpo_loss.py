"""GRPO loss and gradients from hidden states: chunked, against the plain torch expression that materialises logits.

`extra_info` holds the largest tensor each provider allocates and the ratio of its size to the logits'.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcorl_kernels import linear_grpo_loss

# rows, hidden size, vocabulary, trained head
SHAPES = {
    "quickstart image head": (4096, 192, 256, False),
    "quickstart text head": (1600, 192, 383, True),
    "large vocabulary": (512, 256, 16384, True),
    "large vocabulary, frozen head": (512, 256, 16384, False),
}


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made inside the block has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def materialised(hidden, weight, token_ids, advantages, cu_seqlens):
    """What TRL-style trainers write: logits, log-softmax, gather, ratio, mean over sequences."""
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)
    lengths = cu_seqlens.diff()
    per_token = -torch.exp(log_probs - log_probs.detach()) * advantages.repeat_interleave(lengths)
    return (per_token / lengths.repeat_interleave(lengths)).sum() / len(lengths)


def chunked(hidden, weight, token_ids, advantages, cu_seqlens):
    return linear_grpo_loss(hidden, weight, token_ids, advantages, cu_seqlens=cu_seqlens).loss


PROVIDERS = {"materialised": materialised, "fastcorl": chunked}


def make_problem(shape, device):
    rows, size, vocabulary, trained = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(vocabulary, size, generator=generator) / size**0.5).to(device).requires_grad_(trained)
    token_ids = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    cu_seqlens = torch.arange(0, rows + 1, rows // 8).to(device)
    return hidden, weight, token_ids, torch.randn(8, generator=generator).to(device), cu_seqlens


def loss_and_gradients(provider, problem):
    hidden, weight, *_ = problem
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    loss = PROVIDERS[provider](*problem)
    gradients = torch.autograd.grad(loss, leaves)
    if loss.is_cuda:
        torch.cuda.synchronize()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_forward_and_backward(benchmark, device, name, provider):
    problem = make_problem(SHAPES[name], device)
    # Right before fast.
    for ours, expected in zip(
        loss_and_gradients(provider, problem), loss_and_gradients("materialised", problem), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    with LargestTensor() as largest:
        loss_and_gradients(provider, problem)
    rows, _, vocabulary, _ = SHAPES[name]
    benchmark.group = f"{name}, {device}"
    benchmark.extra_info["largest_tensor_mib"] = largest.elements * 4 / 2**20
    benchmark.extra_info["largest_over_logits"] = largest.elements / (rows * vocabulary)
    benchmark.pedantic(loss_and_gradients, args=(provider, problem), rounds=7, warmup_rounds=2)
