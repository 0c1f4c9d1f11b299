"""What callers may do with results, operands and graphs, on both backends."""

import gc
import weakref

import pytest
import torch

import fastcorl_kernels

OPS = ["grpo_loss", "linear_grpo_loss", "selective_log_softmax", "linear_selective_log_softmax"]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles here, for CUDA tensors only")
    return request.param


def make_operands(op, dtype=torch.float32, rows=6, vocabulary=37):
    g = torch.Generator().manual_seed(0)
    if "linear" in op:
        hidden, weight = torch.randn(rows, 5, generator=g), torch.randn(vocabulary, 5, generator=g)
        return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    return [torch.randn(rows, vocabulary, generator=g).to(dtype).requires_grad_()]


def call(op, operands, backend, **kwargs):
    """The GRPOLoss, or (log_probs, entropy)."""
    function = getattr(fastcorl_kernels, op)
    ids = torch.arange(operands[0].shape[0]) % 37
    if "loss" in op:
        advantages, cu_seqlens = torch.tensor([1.0, -2.0]), torch.tensor([0, 2, len(ids)])
        return function(*operands, ids, advantages, cu_seqlens=cu_seqlens, backend=backend, **kwargs)
    return function(*operands, ids, return_entropy=True, backend=backend, **kwargs)


def scalar(result):
    return result[0].sum() if isinstance(result, tuple) else result.loss


@pytest.mark.parametrize("op", OPS)
def test_results_may_be_changed_in_place(op, backend):
    operands = make_operands(op)
    result = call(op, operands, backend)
    if isinstance(result, tuple):
        log_probs, entropy = result  # the backward needs the entropy as it is
        log_probs.masked_fill_(torch.arange(6) == 0, 0.0)
        (log_probs.sum() + entropy.sum()).backward()
    else:
        for metric in (result.log_probs, result.entropy, result.clip_fraction, result.ratio_max):
            metric.mul_(2)
        result.loss.div_(2)
        result.loss.backward()
    assert all(operand.grad.isfinite().all() for operand in operands)


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_raises(op, backend):
    operands = make_operands(op)
    (gradient, *_) = torch.autograd.grad(scalar(call(op, operands, backend)), operands, create_graph=True)
    with pytest.raises(RuntimeError, match="only first derivatives"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_operands_changed_before_the_backward_are_noticed(op, backend):
    operands = make_operands(op)
    copies = [operand * 1.0 for operand in operands]
    loss = scalar(call(op, copies, backend))
    with torch.no_grad():
        copies[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", OPS)
def test_a_result_that_is_kept_keeps_no_operand_alive(op, backend):
    operands = make_operands(op)
    copies = [operand * 1.0 for operand in operands]
    loss = scalar(call(op, copies, backend))
    storages = [weakref.ref(copy.untyped_storage()) for copy in copies]
    del copies
    loss.backward()
    gc.collect()
    assert all(storage() is None for storage in storages)


@pytest.mark.parametrize("op", ["selective_log_softmax", "linear_selective_log_softmax"])
def test_a_temperature_may_change_after_the_forward(op, backend):
    gradients = []
    for changes in (False, True):
        operands, temperature = make_operands(op), torch.linspace(0.5, 2.0, 6)
        loss = scalar(call(op, operands, backend, temperature=temperature))
        if changes:
            temperature.mul_(3)
        gradients.append(torch.autograd.grad(loss, operands))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_float16_gradients_of_a_scaled_mean(op, backend):
    """A mean over many rows underflows in float16 unless the loss scale reaches it in time."""
    operands = make_operands(op, torch.float16)
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    rows, scale = 2.0**14, 2.0**16
    kwargs = {"loss_type": "dr_grpo", "normalizer": rows} if "loss" in op else {}
    losses = [scalar(call(op, x, name, **kwargs)) * scale for x, name in ((operands, backend), (exact, "torch"))]
    if not kwargs:
        losses = [loss / rows for loss in losses]
    for one, other in zip(*map(torch.autograd.grad, losses, (operands, exact)), strict=True):
        assert one.dtype == torch.float16
        assert (one.double() - other).norm() <= 2e-3 * other.norm()


def test_guidance_of_hidden_states_is_rounded_once(backend):
    g = torch.Generator().manual_seed(0)
    hidden, uncond, weight = (torch.randn(*s, generator=g).bfloat16() for s in ((6, 64), (6, 64), (37, 64)))
    kwargs = {"policy": "cfg", "guidance": 5.0, "cu_seqlens": torch.tensor([0, 6]), "backend": "torch"}
    ids, advantages = torch.arange(6), torch.ones(1)
    got = fastcorl_kernels.linear_grpo_loss(hidden, weight, ids, advantages, uncond=uncond, **kwargs).log_probs
    guided = (uncond.double() + 5.0 * (hidden.double() - uncond.double())).bfloat16().double()
    expected = torch.log_softmax(guided @ weight.double().t(), -1).gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_debug_mode_looks_at_ids_of_rows_that_count_only(monkeypatch):
    from fastcorl_kernels.checks import check_index_range

    monkeypatch.setenv("FASTCORL_KERNELS_DEBUG", "1")
    ids, mask = torch.tensor([1, -100]), torch.tensor([True, False])
    check_index_range(ids, "token_ids", 5, mask)
    with pytest.raises(ValueError, match="token_ids"):
        check_index_range(ids, "token_ids", 5)
