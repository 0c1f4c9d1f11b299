"""Packs through variable-length kernels against the padded buckets: stand-ins on the CPU, the kernels on a GPU."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastcorl.errors import UserError
from fastcorl.model import PackedAttention, backends, pack_prompts
from fastcorl.model.backends import OWN, OWN_PACKS, PackedBackend, packed_backend
from fastcorl.model.buckets import make_buckets
from fastcorl.model.pack_layout import PackLayout, by_dense_mask
from tests.model.attention_kernels import (
    attended,
    broken,
    flash_attn,
    grouped,
    install,
    torch_2_10,
    torch_2_11,
    torch_2_12,
    xformers,
)

LENGTHS = [1, 5, 40, 1, 33, 2, 7]
SCALING = 0.3
TRIED = len(OWN_PACKS)  # calls of a way that is tried


@pytest.fixture
def installed(monkeypatch):
    backends._packed_backend.cache_clear()
    yield install(monkeypatch)
    backends._packed_backend.cache_clear()


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


def on_buckets(bounds, states, weights):
    return results(PackedAttention(bounds, backend="sdpa"), [each.double() for each in states], weights)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("name", "function"),
    [("flash_attn", flash_attn), ("xformers", xformers), ("torch", torch_2_11), ("torch", torch_2_12)],
    ids=["flash_attn", "xformers", "torch 2.11", "torch 2.12"],
)
def test_a_kernel_gives_what_the_buckets_give(installed, name, function, heads, kv_heads):
    getattr(installed, name)(function)
    bounds, states, weights = pack(heads, kv_heads)
    assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls[name] == TRIED + 1


@pytest.mark.parametrize("name", ["torch", "xformers"])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 0, 4]], ids=str)
def test_packs_of_the_shortest_sequences(installed, name, lengths):
    getattr(installed, name)({"torch": torch_2_12, "xformers": xformers}[name])
    bounds, states, weights = pack(lengths=lengths)
    assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls[name] == TRIED + 1


def test_flash_attn_comes_first(installed):
    installed.everything()
    bounds, states, weights = pack()
    for _ in range(3):
        results(PackedAttention(bounds), states, weights)
    assert installed.calls == {"flash_attn": TRIED + 3, "xformers": 0, "torch": 0, "flex": 0}


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
def test_a_broken_kernel_is_passed_over_and_refused_by_name(installed, caplog, function):
    installed.flash_attn(function)
    installed.torch(torch_2_11)
    bounds, states, weights = pack()
    with caplog.at_level(logging.INFO):
        assert_same(results(PackedAttention(bounds), states, weights), on_buckets(bounds, states, weights))
    assert installed.calls["torch"] == TRIED + 1
    (line,) = [message for message in caplog.messages if "float32" in message]
    assert ": torch, and sdpa where prefixes are shared (without flash_attn: " in line and "\n" not in line
    with pytest.raises(UserError, match=r"^model.attention: cannot use flash_attn: .+; auto takes what works here$"):
        results(PackedAttention(bounds, backend="flash_attn"), states, weights)


def test_a_bug_shows(installed):
    installed.flash_attn(broken(KeyError("a bug")))
    with pytest.raises(KeyError):
        packed_backend("auto", torch.float32, 8, torch.device("cpu"))


def test_without_a_kernel_the_buckets_run(installed, caplog):
    installed.torch(torch_2_10)  # takes no scale
    bounds, states, weights = pack()
    expected = on_buckets(bounds, states, weights)
    for _ in range(2):
        assert_same(results(PackedAttention(bounds), states, weights), expected)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert ": sdpa (without flash_attn: ModuleNotFoundError" in record.message
    assert "torch: TypeError" in record.message and "flex: RuntimeError: no compiler" in record.message


def test_plans_are_made_once_and_when_they_are_needed(installed):
    installed.torch(torch_2_12)
    bounds, states, _ = pack()
    attention = PackedAttention(bounds)
    attention.attend(0, *states, SCALING)
    assert not attention.layout._plans
    attention.attend(0, *(each.double() for each in states), SCALING)
    made = attention.layout.plan(make_buckets)
    attention.attend(1, *(each.double() for each in states), SCALING)
    assert attention.layout.plan(make_buckets) is made and len(attention.layout._plans) == 1


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
    assert installed.calls["torch"] == TRIED + 2


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
        backends._packed_backend.cache_clear()
        installed.torch(torch_2_12)
        torch.testing.assert_close(policy.hidden_states(batch), expected, rtol=0, atol=1e-5)
    assert installed.calls["torch"] > TRIED


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1, 1], [700, 1, 128, 129, 3]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("name", OWN)
def test_kernels_on_a_gpu(monkeypatch, name, dim, heads, kv_heads, lengths):
    if name in ("flash_attn", "xformers"):
        pytest.importorskip(name)
    monkeypatch.setattr(backends, "_packed_backend", lambda *_: PackedBackend(OWN[name](), by_dense_mask))
    bounds, states, weights = pack(heads, kv_heads, dim, lengths, torch.bfloat16, "cuda")
    actual = results(PackedAttention(bounds), states, weights)
    monkeypatch.undo()
    expected = results(PackedAttention(bounds, backend="sdpa"), [each.float() for each in states], weights)
    for one, other in zip(actual, expected, strict=True):
        # Alone, a position has no gradient in query and key but for rounding.
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02 * weights.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_a_gpu_has_a_kernel(dtype, dim, caplog):
    backends._packed_backend.cache_clear()
    packed_backend("auto", dtype, dim, torch.device("cuda"))
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_reference_is_the_formula():
    bounds, (query, key, value), _ = pack()
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    expected = attended(query, grouped(query, key), grouped(query, value), bounds, SCALING, causal=True)
    torch.testing.assert_close(by_dense_mask(query, key, value, PackLayout(bounds), SCALING), expected)
