"""Packs through variable-length kernels against the padded buckets: stand-ins on the CPU, the kernels on a GPU."""

import logging
import sys
from functools import wraps
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastcorl.model import PackedAttention, pack_prompts
from fastcorl.model import varlen as module
from fastcorl.model.varlen import CANDIDATES, one_by_one, varlen_function

LENGTHS = [1, 5, 40, 1, 33, 2, 7]
SCALING = 0.3


def attended(query, key, value, bounds, scale, causal):
    """Attention by its formula, one sequence at a time: (N, heads, D) states -> (N, heads, D)."""
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        logits = q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        if causal:
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(hidden, float("-inf"))
        outputs.append((logits.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def grouped(query, states):
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def check(query, key, bounds, other_bounds, longest, other_longest):
    assert bounds.dtype == torch.int32 and bounds is other_bounds
    assert longest == other_longest and longest >= bounds.diff().max()
    assert query.shape[0] == key.shape[0] == bounds[-1]


def flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
               return_attn_probs=False, block_table=None):  # fmt: skip
    check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attended(q, grouped(q, k), grouped(q, v), cu_seqlens_q, softmax_scale, causal)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return attended(query, key, value, cu_seq_q, None, is_causal)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):  # fmt: skip
    check(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    assert query.shape == key.shape == value.shape
    return attended(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    check(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    assert enable_gqa or query.shape == key.shape
    key, value = grouped(query, key), grouped(query, value)
    return attended(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


class Installed:
    """What is importable, and how often each was called since."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls = {"flash_attn": 0, "torch": 0}
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", broken(RuntimeError("no torch kernel")))
        monkeypatch.setitem(sys.modules, "flash_attn", None)

    def flash_attn(self, function):
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = self._counted("flash_attn", function)
        self.monkeypatch.setitem(sys.modules, "flash_attn", package)

    def torch(self, function):
        self.monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", self._counted("torch", function))

    def _counted(self, name, function):
        @wraps(function)  # also its signature
        def counted(*args, **options):
            self.calls[name] += 1
            return function(*args, **options)

        return counted


def broken(problem):
    def function(*args, **options):
        raise problem

    return function


@pytest.fixture
def installed(monkeypatch):
    """Lets float32 packs on the CPU take the way of half precision on CUDA; nothing works there until it is added."""
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "DTYPES", (torch.float32,))
    varlen_function.cache_clear()
    yield Installed(monkeypatch)
    varlen_function.cache_clear()


def pack(heads=4, kv_heads=2, dim=8, lengths=LENGTHS, dtype=torch.float32, device="cpu"):
    """(S + 1,) bounds, and as transformers gives them (1, heads, N, D) query, key and value, and (1, N, heads, D)
    weights of the output."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, sum(lengths), count, dim) for count in (heads, kv_heads, kv_heads, heads)]
    *states, weights = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    return bounds, [each.transpose(1, 2).requires_grad_() for each in states], weights


def results(attention, states, weights):
    out = attention.attend(0, *states, SCALING)
    return out, *torch.autograd.grad(out, states, weights.to(out.dtype))


def on_buckets(bounds, states, weights, **options):
    """float64 never takes a kernel."""
    return results(PackedAttention(bounds, **options), [each.double() for each in states], weights)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("name", "function"),
    [("flash_attn", flash_attn), ("torch", torch_2_11), ("torch", torch_2_12)],
    ids=["flash_attn", "torch 2.11", "torch 2.12"],
)
def test_a_kernel_gives_what_the_buckets_give(installed, name, function, heads, kv_heads):
    getattr(installed, name)(function)
    bounds, states, weights = pack(heads, kv_heads)
    assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls[name] == 2  # tried once, then called


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 0, 4]], ids=str)
def test_packs_of_the_shortest_sequences(installed, lengths):
    installed.torch(torch_2_12)
    bounds, states, weights = pack(lengths=lengths)
    assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls["torch"] == 2


def test_flash_attn_comes_first(installed, caplog):
    installed.flash_attn(flash_attn)
    installed.torch(torch_2_12)
    bounds, states, weights = pack()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            results(PackedAttention(bounds), states, weights)
    assert installed.calls == {"flash_attn": 4, "torch": 0}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "runs on flash_attn" in caplog.text


def uncausal(*args, softmax_scale, **_):
    return flash_attn(*args, softmax_scale=softmax_scale, causal=False)


def unscaled(*args, causal, **_):
    return flash_attn(*args, causal=causal)


def undifferentiated(q, k, v, *args, **options):
    return flash_attn(q, k, v.detach() + 0 * v, *args, **options)


def one_wrong(*args, **options):
    return flash_attn(*args, **options).index_fill(0, torch.tensor([2]), 0.0)


def not_a_number(*args, **options):
    return flash_attn(*args, **options) * float("nan")


@pytest.mark.parametrize(
    "function",
    [
        broken(RuntimeError("no kernel image is available\nfor this device")),
        broken(NotImplementedError("not on this device")),
        broken(ImportError("undefined symbol")),
        broken(TypeError("unexpected argument")),
        uncausal,
        unscaled,
        undifferentiated,
        one_wrong,
        not_a_number,
    ],
    ids=lambda function: function.__name__,
)
def test_a_broken_kernel_is_passed_over(installed, caplog, function):
    installed.flash_attn(function)
    installed.torch(torch_2_11)
    bounds, states, weights = pack()
    with caplog.at_level(logging.INFO):
        assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls == {"flash_attn": 1, "torch": 2}
    skipped, taken = caplog.messages
    assert "without flash_attn: " in skipped and "\n" not in skipped
    assert "runs on torch.nn.attention.varlen" in taken


def test_a_bug_shows(installed):
    installed.flash_attn(broken(KeyError("a bug")))
    with pytest.raises(KeyError):
        varlen_function(torch.float32, 8, None)


def test_without_a_kernel_the_buckets_run(installed, caplog):
    installed.torch(torch_2_10)  # takes no scale
    bounds, states, weights = pack()
    for _ in range(2):
        attention = PackedAttention(bounds)
        assert_same(results(attention, states, weights), on_buckets(bounds, states, weights))
    assert "buckets" in vars(attention)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3  # two reasons and the outcome, once
    assert "ModuleNotFoundError" in caplog.text and "TypeError" in caplog.text and "padded buckets" in caplog.text


def test_buckets_are_built_when_they_are_needed(installed):
    installed.torch(torch_2_12)
    bounds, states, _ = pack()
    attention = PackedAttention(bounds)
    attention.attend(0, *states, SCALING)
    assert "buckets" not in vars(attention)
    attention.attend(0, *(each.double() for each in states), SCALING)
    built = attention.buckets
    attention.attend(1, *(each.double() for each in states), SCALING)
    assert attention.buckets is built


def test_sequences_that_continue_others_stay_on_the_buckets(installed):
    installed.torch(torch_2_12)
    bounds, states, weights = pack()
    prefixes = torch.tensor([-1, 0, -1, 2, 2, -1, 5])
    attention = PackedAttention(bounds, prefixes)
    assert_same(results(attention, states, weights), on_buckets(bounds, states, weights, prefixes=prefixes))
    assert installed.calls["torch"] == 0
    on_their_own = PackedAttention(bounds, torch.full_like(prefixes, -1))
    assert_same(results(on_their_own, states, weights), on_buckets(bounds, states, weights))
    assert installed.calls["torch"] == 2


def test_keys_and_values_are_kept(installed):
    installed.torch(torch_2_12)
    bounds, states, _ = pack()
    attention = PackedAttention(bounds, keep_kv=True)
    for layer in range(2):
        attention.attend(layer, *states, SCALING)
    for kept, given in ((attention.keys, states[1]), (attention.values, states[2])):
        assert len(kept) == 2 and all(torch.equal(each, given[0].transpose(0, 1)) for each in kept)


def test_the_choice_may_fall_in_inference_mode(installed):
    installed.torch(torch_2_12)
    bounds, states, weights = pack()
    with torch.inference_mode():
        PackedAttention(bounds).attend(0, *states, SCALING)
    assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls["torch"] == 3


def test_the_choice_may_fall_in_a_checkpointed_layer(installed):
    installed.torch(torch_2_12)
    bounds, states, weights = pack()
    attention = PackedAttention(bounds)
    out = checkpoint(attention.attend, 0, *states, SCALING, use_reentrant=False)
    gradients = torch.autograd.grad(out, states, weights)
    assert_same((out, *gradients), on_buckets(bounds, states, weights))


def test_a_policy_through_a_kernel(policy, installed):
    prompts = [[7] * length for length in LENGTHS]
    batch = pack_prompts(prompts, None, policy.encoder.image_id, policy.device)
    with torch.no_grad():
        expected = policy.hidden_states(batch)
        varlen_function.cache_clear()
        installed.torch(torch_2_12)
        torch.testing.assert_close(policy.hidden_states(batch), expected, rtol=0, atol=1e-5)
    assert installed.calls["torch"] > 1


def test_the_cpu_and_float32_take_no_kernel(monkeypatch):
    monkeypatch.setattr(module, "varlen_function", broken(AssertionError("chosen")))
    for dtype in (torch.float32, torch.bfloat16):
        bounds, states, _ = pack(dtype=dtype)
        PackedAttention(bounds).attend(0, *states, SCALING)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1, 1], [700, 1, 128, 129, 3]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("name", CANDIDATES)
def test_kernels_on_a_gpu(monkeypatch, name, dim, heads, kv_heads, lengths):
    if name == "flash_attn":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr(module, "varlen_function", lambda *_: CANDIDATES[name]())
    bounds, states, weights = pack(heads, kv_heads, dim, lengths, torch.bfloat16, "cuda")
    attention = PackedAttention(bounds)
    actual = results(attention, states, weights)
    assert "buckets" not in vars(attention)
    expected = results(PackedAttention(bounds), [each.float() for each in states], weights)
    for one, other in zip(actual, expected, strict=True):
        # Alone, a position has no gradient in query and key but for rounding.
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02 * weights.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_a_gpu_has_a_kernel(dtype, dim):
    assert varlen_function(dtype, dim, torch.cuda.current_device()) is not None


def test_the_reference_is_the_formula():
    bounds, (query, key, value), _ = pack()
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    expected = attended(query, grouped(query, key), grouped(query, value), bounds, SCALING, causal=True)
    torch.testing.assert_close(one_by_one(query, key, value, bounds, 40, SCALING), expected)
