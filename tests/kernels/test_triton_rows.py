"""Triton's log-probabilities against the float64 reference; interpreted where there is no GPU."""

import pytest
import torch

from fastcorl_kernels import linear_selective_log_softmax, selective_log_softmax
from fastcorl_kernels.linear_log_softmax.reference import linear_selective_log_softmax_reference
from fastcorl_kernels.log_softmax.reference import selective_log_softmax_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # in values that are not selected
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_logits(n=7, v=37, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, v, generator=g)).to(dtype).to(device).requires_grad_()
    return logits, torch.randint(v, (n,), generator=g).to(device)


def gradients(result, inputs):
    outputs = result if isinstance(result, tuple) else (result,)
    upstream = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device) + i for i, o in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream)


def exact_copy(tensor):
    return tensor.detach().double().requires_grad_()


def assert_same(got, expected, inputs, exact_inputs, tolerance):
    got_outputs, outputs = (x if isinstance(x, tuple) else (x,) for x in (got, expected))
    for one, other in zip(got_outputs, outputs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other, given in zip(gradients(got, inputs), gradients(expected, exact_inputs), inputs, strict=True):
        assert one.dtype == given.dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.01, 100.0, "per row"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (7, 37)])
def test_selective_log_softmax(triton_device, tiling, shape, temperature, entropy, dtype):
    logits, index = make_logits(*shape, dtype, triton_device)
    if temperature == "per row":
        temperature = torch.linspace(0.5, 2.0, shape[0], device=triton_device)
    got = selective_log_softmax(logits, index, temperature=temperature, return_entropy=entropy, backend="triton")
    exact = exact_copy(logits)
    expected = selective_log_softmax_reference(exact, index, temperature, entropy)
    tolerance = TOLERANCE[dtype] / min(1.0, 1.0 if isinstance(temperature, torch.Tensor) else temperature)
    scale = 1.0 if not isinstance(temperature, float) else max(1.0, 1.0 / temperature)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * scale)
    for one, other in zip(gradients(got, logits), gradients(expected, exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("forbidden", [slice(0, 20), slice(20, None), slice(1, None, 2)])
def test_a_partly_forbidden_vocabulary(triton_device, tiling, forbidden):
    logits, _ = make_logits(device=triton_device)
    with torch.no_grad():
        logits[:, forbidden] = -torch.inf
    allowed = logits.detach()[0].isfinite().nonzero().squeeze(1)
    index = allowed[torch.arange(7, device=triton_device) % len(allowed)]
    exact = exact_copy(logits)
    got = selective_log_softmax(logits, index, return_entropy=True, backend="triton")
    expected = selective_log_softmax_reference(exact, index, return_entropy=True)
    assert_same(got, expected, (logits,), (exact,), 1e-5)


def test_a_forbidden_token(triton_device, tiling):
    logits, index = make_logits(device=triton_device)
    with torch.no_grad():
        logits[torch.arange(7), index] = -torch.inf
    log_probs = selective_log_softmax(logits, index, backend="triton")
    assert log_probs.isneginf().all()
    assert torch.autograd.grad(log_probs, logits, torch.ones_like(log_probs))[0].isfinite().all()


@pytest.mark.parametrize("offset", [-1e4, -104.0, 1e4])
def test_logits_far_from_zero(triton_device, tiling, offset):
    logits, index = make_logits(device=triton_device)
    logits = (logits.detach() + offset).requires_grad_()
    exact = exact_copy(logits)
    got = selective_log_softmax(logits, index, return_entropy=True, backend="triton")
    expected = selective_log_softmax_reference(exact, index, return_entropy=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=abs(offset) * 1e-6)


@pytest.mark.parametrize("view", ["row stride", "column stride", "transposed", "reversed rows"])
def test_strided_views(triton_device, tiling, view):
    base, index = make_logits(14, 38, device=triton_device)
    views = {
        "row stride": lambda x: x[::2, :-1],
        "column stride": lambda x: x[:7, ::2],
        "transposed": lambda x: x.reshape(38, 14).t()[:7],
        "reversed rows": lambda x: x.flip(0)[:7],
    }
    exact = exact_copy(base)
    logits, expected_logits = (views[view](x) for x in (base, exact))
    index = index[:7] % logits.shape[1]
    got = selective_log_softmax(logits, index.int(), backend="triton")
    expected = selective_log_softmax_reference(expected_logits, index)
    assert_same(got, expected, (base,), (exact,), 1e-5)


def test_no_rows(triton_device):
    logits = torch.zeros(0, 5, device=triton_device, requires_grad=True)
    log_probs = selective_log_softmax(logits, torch.zeros(0, dtype=torch.long, device=triton_device), backend="triton")
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and logits.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per row"])
def test_linear_selective_log_softmax(triton_device, monkeypatch, temperature, with_bias, entropy, dtype):
    from fastcorl_kernels import chunking

    monkeypatch.setattr(chunking, "MINIMUM_CHUNK_ROWS", 3)
    monkeypatch.setattr(chunking, "FROZEN_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunking, "TRAINED_CHUNK_ELEMENTS", 1)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).to(triton_device).requires_grad_()
        for shape in ((8, 5), (37, 5), (37,))
    )
    bias = bias if with_bias else None
    index = torch.randint(37, (8,), generator=g).to(triton_device)
    if temperature == "per row":
        temperature = torch.linspace(0.5, 2.0, 8, device=triton_device)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    exact = [exact_copy(t) for t in inputs]
    got = linear_selective_log_softmax(
        hidden, weight, index, bias=bias, temperature=temperature, return_entropy=entropy, backend="triton"
    )
    expected = linear_selective_log_softmax_reference(
        exact[0], exact[1], index, exact[2] if with_bias else None, temperature, entropy
    )
    tolerance = 4 * TOLERANCE[dtype]
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    for one, other, given in zip(gradients(got, inputs), gradients(expected, exact), inputs, strict=True):
        assert one.dtype == given.dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=4 * tolerance)
