"""Packs with shared prefixes on every way to attend, against a dense mask and against whole sequences.

In float64 and float32 on the CPU kernels are stand-ins that compute the formula; the kernels run on a GPU.
"""

from itertools import accumulate

import pytest
import torch

from fastcorl.model import PackedAttention, backends
from fastcorl.model.backends import SHARED
from fastcorl.model.buckets import by_buckets
from fastcorl.model.flex import block_mask, by_flex
from fastcorl.model.pack_layout import PackLayout, by_dense_mask
from fastcorl.model.prefix_attention import PlainKernel, TwoPartAttention, in_two_parts, two_parts
from tests.model.attention_kernels import broken, install

# Relative in norm: of outputs and of all gradients, on every way. bfloat16 is that of the kernels on a GPU.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.02}
SCALING = 0.3

# Lengths, prefixes, and how much of these is seen (None: all).
PACKS = {
    "a group": ([5, 3, 4, 1], [-1, 0, 0, 0], None),
    "several groups, unequal": ([5, 3, 40, 130, 9, 1, 7, 2], [-1, 0, 0, -1, 3, 3, 3, -1], None),
    "groups apart and mixed": ([3, 150, 2, 4, 130, 6], [1, -1, 4, 1, -1, 4], None),
    "prefixes last": ([3, 2, 4, 5], [3, 3, 3, -1], None),
    "no prefix": ([5, 3, 200, 1], None, None),
    "no prefix, said": ([5, 3, 20, 1], [-1] * 4, None),
    "empty and single": ([0, 1, 1, 0, 1, 4, 0], [-1, 0, 1, 1, 1, 3, -1], None),
    "parts of prefixes": ([12, 1, 3, 2, 5, 4], [-1, 0, 0, 0, 0, -1], [0, 1, 7, 12, 0, 0]),
    "parts across blocks": ([300, 5, 140, 130, 1], [-1, 0, 0, 2, 2], [0, 300, 128, 129, 1]),
    "a chain and its ends": ([9, 1, 1, 1], [-1, 0, 0, 0], [0, 3, 9, 0]),
    "prefixes of which nothing is seen": ([4, 2, 3], [-1, 0, 0], [0, 0, 0]),
    "whole blocks": ([256, 128, 128, 256], [-1, 0, 0, -1], None),
}


@pytest.fixture(autouse=True)
def fresh():
    backends._packed_backend.cache_clear()
    yield
    backends._packed_backend.cache_clear()


def states_of(lengths, heads=4, kv_heads=2, dim=8, dtype=torch.float64, device="cpu"):
    """(N, heads, D) query, key and value, and weights of the output."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(sum(lengths), count, dim) for count in (heads, kv_heads, kv_heads, heads)]
    *states, weights = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [each.requires_grad_() for each in states], weights


def tensors(lengths, prefixes, prefix_lengths, device="cpu"):
    bounds = torch.tensor([0, *accumulate(lengths)], device=device)
    return bounds, *(None if given is None else torch.tensor(given) for given in (prefixes, prefix_lengths))


def results(attend, states, weights):
    out = attend(*states)
    return out, *torch.autograd.grad(out, states, weights)


def assert_same(actual, expected, bound):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).norm()
        # Alone, a position has no gradient in query and key but for rounding.
        assert error <= bound * max(other.norm(), 1), f"off by {error / other.norm():.1e}"


def dense(layout, states, weights):
    exact = [each.detach().double().requires_grad_() for each in states]
    return results(lambda *each: by_dense_mask(*each, layout, SCALING), exact, weights.double())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(4, 4, torch.float64), (4, 2, torch.float32), (3, 1, torch.float64)], ids=str
)
@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_every_backend_gives_what_a_dense_mask_gives(monkeypatch, backend, pack, heads, kv_heads, dtype):
    install(monkeypatch, dtype).everything()
    bounds, prefixes, prefix_lengths = tensors(*pack)
    states, weights = states_of(pack[0], heads, kv_heads, dtype=dtype)
    attention = PackedAttention(bounds, prefixes, prefix_lengths=prefix_lengths, backend=backend)
    actual = results(lambda *each: attention.attend_packed(*each, SCALING), states, weights)
    assert_same(actual, dense(attention.layout, states, weights), BOUNDS[dtype])


def test_the_dense_mask_gives_what_whole_sequences_give():
    lengths, prefixes, limits = PACKS["parts of prefixes"]
    states, _ = states_of(lengths)
    out = by_dense_mask(*states, PackLayout(*tensors(lengths, prefixes, limits)), SCALING)
    ends = list(accumulate(lengths))
    for own, prefix, limit in zip(range(len(lengths)), prefixes, limits, strict=True):
        rows = torch.arange(ends[own] - lengths[own], ends[own])
        whole = torch.cat([torch.arange(ends[prefix] - lengths[prefix], ends[prefix])[:limit], rows])
        alone = PackLayout(torch.tensor([0, len(whole)]))
        expected = by_dense_mask(*(each[whole] for each in states), alone, SCALING)
        torch.testing.assert_close(out[rows], expected[-len(rows) :])


@pytest.mark.parametrize("pack", ["a group", "groups apart and mixed", "parts of prefixes"])
def test_gradients_of_two_parts_are_those_of_finite_differences(pack):
    lengths = [min(length, 9) for length in PACKS[pack][0]]
    layout = PackLayout(*tensors(lengths, *PACKS[pack][1:]))
    states, _ = states_of(lengths, heads=2, kv_heads=1, dim=3)
    parts = two_parts(layout)
    assert torch.autograd.gradcheck(
        lambda *each: TwoPartAttention.apply(*each, PlainKernel(), parts, SCALING), states, fast_mode=True
    )


def test_contiguous_positions_are_read_in_place():
    parts = two_parts(PackLayout(*tensors([5, 3, 4, 1], [-1, 0, 0, 0], None)))
    assert (parts.queries, parts.keys) == (slice(5, 13), slice(0, 5))
    assert parts.prefix.cu_queries.tolist() == [0, 8] and parts.prefix.cu_keys.tolist() == [0, 5]
    apart = two_parts(PackLayout(*tensors([5, 3, 6, 2, 1], [-1, 0, -1, 2, 2], None)))
    assert apart.queries.tolist() == [5, 6, 7, 14, 15, 16] and apart.prefix.cu_queries.tolist() == [0, 3, 6]


def test_far_apart_logsumexps_merge_without_overflow():
    layout = PackLayout(*tensors([6, 3], [-1, 0], None))
    for scaling in (200.0, -200.0):
        states, weights = states_of([6, 3], dtype=torch.float32)
        actual = results(lambda *each, s=scaling: in_two_parts(PlainKernel())(*each, layout, s), states, weights)
        exact = [each.detach().double().requires_grad_() for each in states]
        expected = results(lambda *each, s=scaling: by_dense_mask(*each, layout, s), exact, weights.double())
        assert_same(actual, expected, 1e-4)  # logits of a thousand are rounded to 6e-5 in float32


def test_two_parts_in_inference_mode_and_without_gradients():
    layout = PackLayout(*tensors(*PACKS["several groups, unequal"]))
    states, _ = states_of(PACKS["several groups, unequal"][0])
    expected = by_dense_mask(*states, layout, SCALING).detach()
    with torch.inference_mode():
        torch.testing.assert_close(in_two_parts(PlainKernel())(*states, layout, SCALING), expected)
    out = in_two_parts(PlainKernel())(*(each.detach() for each in states), layout, SCALING)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("works", "chosen"),
    [(("flash_attn", "aten", "flex"), "flash_attn"), (("aten", "flex"), "torch"), (("flex",), "flex"), ((), "sdpa")],
    ids=str,
)
def test_auto_prefers_two_parts_then_flex_then_buckets(monkeypatch, caplog, works, chosen):
    installed = install(monkeypatch)
    installed.everything()
    if "flash_attn" not in works:
        monkeypatch.setitem(backends.SHARED, "flash_attn", broken(ImportError("no package")))
    if "aten" not in works:
        installed.aten(forward=broken(NotImplementedError("no kernel")))
    if "flex" not in works:
        installed.flex(broken(RuntimeError("no compiler")))
    with caplog.at_level("INFO"):
        packed_backend = backends.packed_backend("auto", torch.float32, 8, torch.device("cpu"))
    assert (packed_backend.shared is by_buckets) == (chosen == "sdpa")
    assert (packed_backend.shared is by_flex) == (chosen == "flex")
    (line,) = caplog.messages
    assert (f", and {chosen} where" in line) == (chosen != "flash_attn") and ": flash_attn" in line


class NotMerged(PlainKernel):
    """Its backward takes the output and the logsumexp of its own part."""

    def backward(self, grad, query, key, value, out, lse, segments, scaling, causal):
        own = self.forward(query, key, value, segments, scaling, causal)
        return super().backward(grad, query, key, value, *own, segments, scaling, causal)


class InBaseTwo(PlainKernel):
    def forward(self, *args, **options):
        out, lse = super().forward(*args, **options)
        return out, lse / torch.log(torch.tensor(2.0))


class Transposed(PlainKernel):
    def forward(self, *args, **options):
        out, lse = super().forward(*args, **options)
        return out, lse.T


@pytest.mark.parametrize("kernel", [NotMerged, InBaseTwo, Transposed])
def test_kernels_with_other_logsumexps_are_refused(monkeypatch, kernel):
    install(monkeypatch).everything()
    monkeypatch.setitem(backends.SHARED, "torch", lambda: in_two_parts(kernel()))
    assert backends.packed_backend("torch", torch.float32, 8, torch.device("cpu")).shared is by_flex


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_the_block_mask_is_that_of_torch(pack):
    """Torch's own from the whole (N, N) mask, up to full blocks that hold a prefix and the sequence next to it."""
    from torch.nn.attention.flex_attention import create_block_mask

    layout = PackLayout(*tensors(*pack))
    ours = block_mask(layout)
    theirs = create_block_mask(ours.mask_mod, None, None, layout.size, layout.size, device="cpu")
    assert ours.to_dense().equal(theirs.to_dense()) and ours.shape == theirs.shape
    assert ours.full_kv_num_blocks.le(theirs.full_kv_num_blocks).all()


def test_flex_as_torch_runs_it_on_a_cpu(monkeypatch):
    """Forward and not compiled: on a CPU there is no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("fastcorl.model.flex.flex_attention", lambda: flex_attention)
    pack = PACKS["parts across blocks"]
    layout = PackLayout(*tensors(*pack))
    states, _ = states_of(pack[0], dim=16, dtype=torch.float32)
    with torch.no_grad():
        actual = by_flex(*(each.detach() for each in states), layout, SCALING)
    torch.testing.assert_close(actual, by_dense_mask(*states, layout, SCALING), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", SHARED)
def test_ways_on_a_gpu(name, dim, heads, kv_heads, pack):
    if name == "flash_attn":
        pytest.importorskip("flash_attn")
    layout = PackLayout(*tensors(*pack, device="cuda"))
    if not layout.shares:
        pytest.skip("goes the way of packs without prefixes")
    states, weights = states_of(pack[0], heads, kv_heads, dim, torch.bfloat16, "cuda")
    actual = results(lambda *each: SHARED[name]()(*each, layout, SCALING), states, weights)
    assert_same(actual, dense(layout, states, weights), BOUNDS[torch.bfloat16])
