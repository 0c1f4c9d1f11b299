"""Triton's GRPO losses against the float64 reference; interpreted where there is no GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcorl_kernels import (
    chunking,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
)
from fastcorl_kernels.grpo.batch import LossSettings, prepare_batch
from fastcorl_kernels.grpo.reference import grpo_loss_reference
from fastcorl_kernels.linear_grpo.reference import linear_grpo_loss_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # in values that are not selected
]
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
CLIPS = [{"eps_low": 0.2, "eps_high": 0.28}, {"eps_low": None}, {"delta": 1.1}]
LOSSES_AND_CLIPS = [(loss, clip) for loss in LOSS_TYPES for clip in CLIPS if loss != "cispo" or "delta" not in clip]


def move(problem, device, dtype=torch.float32):
    """The float64 problem, and the same numbers for the kernel: (exact, given)."""
    given = {}
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            kind = dtype if name in ("hidden", "weight", "bias") else torch.float32
            value = value.detach().to(device=device, dtype=kind if value.is_floating_point() else None)
        given[name] = value
    exact = {
        name: value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    for group in (exact, given):
        for name in ("hidden", "weight", "bias"):
            group[name].requires_grad_()
    return type(problem)(**exact), type(problem)(**given)


def expected_loss(function, scores, vocabulary, p, advantages, settings, old, mask, ratios=None, **guided):
    batch = prepare_batch(
        scores[0],
        vocabulary,
        torch.float64,
        LossSettings(**settings),
        p.token_ids,
        advantages,
        p.cu_seqlens,
        None,
        None,
        old,
        p.ref_log_probs,
        mask,
        ratios,
    )
    return function(*scores, batch, LossSettings(**settings), **guided)


class GradientBuffers(TorchDispatchMode):
    """How many tensors of a shape are made to be filled."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        makes = function.overloadpacket in (aten.empty_like, aten.zeros_like, aten.empty, aten.zeros, aten.new_zeros)
        self.count += makes and out.shape == self.shape
        return out


def assert_same(got, expected, inputs, exact_inputs, tolerance=1e-5, upstream=2.5):
    for name, value in vars(expected).items():
        one = getattr(got, name)
        assert one.dtype == torch.float32
        torch.testing.assert_close(
            one.double(), value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    ours = torch.autograd.grad(got.loss * upstream, inputs)
    theirs = torch.autograd.grad(expected.loss * upstream, exact_inputs)
    for one, other, given in zip(ours, theirs, inputs, strict=True):
        assert one.dtype == given.dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("loss_type", "clip"), LOSSES_AND_CLIPS, ids=str)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_grpo_loss(make_problem, triton_device, tiling, loss_type, importance, clip, beta, old, masked):
    exact, given = move(make_problem(vocabulary=37, masked=masked), triton_device)
    settings = {
        "temperature": 0.7,
        "beta": beta,
        "loss_type": loss_type,
        "importance": importance,
        "normalizer": 21 if loss_type == "dr_grpo" else None,
        **clip,
    }
    logits = (given.hidden @ given.weight.t()).detach().requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    exact_old = exact.old_log_probs if old else None
    expected = expected_loss(
        grpo_loss_reference, (exact_logits,), 37, exact, exact.advantages, settings, exact_old, exact.mask
    )
    got = grpo_loss(
        logits,
        given.token_ids,
        given.advantages,
        cu_seqlens=given.cu_seqlens,
        old_log_probs=given.old_log_probs if old else None,
        ref_log_probs=given.ref_log_probs,
        mask=given.mask,
        backend="triton",
        **settings,
    )
    assert_same(got, expected, (logits,), (exact_logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [2, 6, 100])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_linear_grpo_loss(make_problem, triton_device, monkeypatch, importance, chunk, with_bias, masked, dtype):
    monkeypatch.setattr(chunking, "MINIMUM_CHUNK_ROWS", chunk)
    monkeypatch.setattr(chunking, "FROZEN_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunking, "TRAINED_CHUNK_ELEMENTS", 1)
    exact, given = move(make_problem(vocabulary=37, masked=masked), triton_device, dtype)
    settings = {"temperature": 0.7, "beta": 0.1, "importance": importance}
    expected = expected_loss(
        linear_grpo_loss_reference,
        (exact.hidden, exact.weight, exact.bias if with_bias else None),
        37,
        exact,
        exact.row_advantages,
        settings,
        exact.old_log_probs,
        exact.mask,
    )
    got = linear_grpo_loss(
        given.hidden,
        given.weight,
        given.token_ids,
        given.row_advantages,
        cu_seqlens=given.cu_seqlens,
        bias=given.bias if with_bias else None,
        old_log_probs=given.old_log_probs,
        ref_log_probs=given.ref_log_probs,
        mask=given.mask,
        backend="triton",
        **settings,
    )
    names = ("hidden", "weight", "bias") if with_bias else ("hidden", "weight")
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert_same(got, expected, *([getattr(x, n) for n in names] for x in (given, exact)), tolerance)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(make_problem, triton_device, frozen):
    exact, given = move(make_problem(vocabulary=37), triton_device)
    for group in (exact, given):
        getattr(group, frozen).requires_grad_(False)
    moving = "weight" if frozen == "hidden" else "hidden"
    expected = expected_loss(
        linear_grpo_loss_reference,
        (exact.hidden, exact.weight, None),
        37,
        exact,
        exact.advantages,
        {},
        None,
        exact.mask,
    )
    got = linear_grpo_loss(
        given.hidden,
        given.weight,
        given.token_ids,
        given.advantages,
        cu_seqlens=given.cu_seqlens,
        ref_log_probs=given.ref_log_probs,
        mask=given.mask,
        backend="triton",
    )
    assert_same(got, expected, [getattr(given, moving)], [getattr(exact, moving)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.3])
def test_guided_logits(make_problem, triton_device, tiling, guidance, importance, masked):
    exact, given = move(make_problem(vocabulary=37, masked=masked), triton_device)
    uncond = torch.randn(11, 37, generator=torch.Generator().manual_seed(7)).to(triton_device).requires_grad_()
    logits = (given.hidden @ given.weight.t()).detach().requires_grad_()
    exact_logits, exact_uncond = (x.detach().double().requires_grad_() for x in (logits, uncond))
    settings = {"importance": importance, "eps_low": None}
    expected = expected_loss(
        grpo_loss_reference,
        (exact_logits,),
        37,
        exact,
        exact.advantages,
        settings,
        None,
        exact.mask,
        uncond=exact_uncond,
        guidance=guidance,
    )
    got = grpo_loss(
        logits,
        given.token_ids,
        given.advantages,
        cu_seqlens=given.cu_seqlens,
        ref_log_probs=given.ref_log_probs,
        mask=given.mask,
        policy="cfg",
        uncond=uncond,
        guidance=guidance,
        backend="triton",
        **settings,
    )
    assert_same(got, expected, (logits, uncond), (exact_logits, exact_uncond))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("moving", [0, 1])
def test_a_fixed_part_of_guided_logits_costs_no_gradient(triton_device, tiling, moving, importance, linear, backend):
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, 37, generator=g).to(triton_device) for _ in range(2)]
    head = [torch.randn(29, 37, generator=g).to(triton_device)] if linear else []
    rest = (torch.arange(6, device=triton_device), torch.tensor([1.0, -2.0], device=triton_device))
    mask = torch.arange(6, device=triton_device) != 3
    kwargs = {"cu_seqlens": torch.tensor([0, 2, 6]), "mask": mask, "policy": "cfg", "guidance": 3.0}

    def gradients(wanted):
        leaves = [part.clone().requires_grad_(i in wanted) for i, part in enumerate(parts)]
        with GradientBuffers(leaves[0].shape) as buffers:
            loss = (linear_grpo_loss if linear else grpo_loss)(
                leaves[0], *head, *rest, uncond=leaves[1], importance=importance, backend=backend, **kwargs
            ).loss
            loss.backward()
        return [leaf.grad for leaf in leaves], buffers.count

    (expected, both), (got, one) = gradients((0, 1)), gradients((moving,))
    assert torch.equal(got[moving], expected[moving]) and got[1 - moving] is None
    assert linear or one == both - 1


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_importance_ratios(make_problem, triton_device, importance, per_row):
    exact, given = move(make_problem(vocabulary=37), triton_device)
    ratios = torch.rand(11 if per_row else 4, generator=torch.Generator().manual_seed(3)).to(triton_device)
    ratios[1] = 0.0
    settings = {"importance": importance, "beta": 0.1}
    logits = (given.hidden @ given.weight.t()).detach().requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    args = (exact, exact.advantages, settings, exact.old_log_probs, exact.mask, ratios.double())
    expected = expected_loss(grpo_loss_reference, (exact_logits,), 37, *args)
    got = grpo_loss(
        logits,
        given.token_ids,
        given.advantages,
        cu_seqlens=given.cu_seqlens,
        old_log_probs=given.old_log_probs,
        ref_log_probs=given.ref_log_probs,
        mask=given.mask,
        importance_ratios=ratios,
        backend="triton",
        **settings,
    )
    assert_same(got, expected, (logits,), (exact_logits,))


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_what_is_not_selected_adds_nothing(triton_device, tiling, loss_type):
    """Overflowing ratios that the clip replaces or whose advantage is 0, and garbage on masked rows."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 37, generator=g)
    logits[5] = torch.nan
    logits = logits.to(triton_device).requires_grad_()
    ids = torch.tensor([1, 2, 3, 4, 5, -100], device=triton_device)
    old = torch.tensor([-1.0, -200.0, -200.0, -1.0, -2.0, torch.inf], device=triton_device)
    advantages = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, torch.nan], device=triton_device)
    mask = torch.tensor([True] * 5 + [False], device=triton_device)
    kwargs = {"cu_seqlens": torch.tensor([0, 3, 6]), "old_log_probs": old, "mask": mask, "loss_type": loss_type}
    got = grpo_loss(logits, ids, advantages, backend="triton", **kwargs)
    expected = grpo_loss(logits, ids, advantages, backend="torch", **kwargs)
    assert got.loss.isfinite() and got.ratio_max.isinf()
    torch.testing.assert_close(got.loss, expected.loss)
    one, other = (torch.autograd.grad(result.loss, logits)[0] for result in (got, expected))
    assert one.isfinite().all() and one[5].eq(0).all()
    torch.testing.assert_close(one, other)


def test_a_second_backward_agrees_with_the_first(make_problem, triton_device):
    _, given = move(make_problem(vocabulary=37), triton_device)
    loss = linear_grpo_loss(
        given.hidden, given.weight, given.token_ids, given.advantages, cu_seqlens=given.cu_seqlens, backend="triton"
    ).loss
    runs = [torch.autograd.grad(3.0 * loss, (given.hidden, given.weight), retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_no_row_counts(make_problem, triton_device, importance, linear):
    _, given = move(make_problem(vocabulary=37), triton_device)
    kwargs = {"cu_seqlens": given.cu_seqlens, "mask": torch.zeros_like(given.mask), "importance": importance}
    if linear:
        inputs = (given.hidden, given.weight)
        result = linear_grpo_loss(*inputs, given.token_ids, given.advantages, backend="triton", **kwargs)
    else:
        inputs = ((given.hidden @ given.weight.t()).detach().requires_grad_(),)
        result = grpo_loss(*inputs, given.token_ids, given.advantages, backend="triton", **kwargs)
    result.loss.backward()
    assert result.loss == 0 and all(tensor.grad.eq(0).all() for tensor in inputs)


@pytest.mark.parametrize("mode", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("group_size", [1, 2, 5, 8])
def test_group_advantages(triton_device, group_size, columns, scale, mode):
    g = torch.Generator().manual_seed(group_size)
    shape = (4 * group_size,) if columns is None else (4 * group_size, columns)
    rewards = torch.randn(shape, generator=g) * 0.02 + 1000
    rewards[:group_size] = 0.1
    if group_size > 2:
        rewards.view(4 * group_size, -1)[group_size, 0] = torch.nan
    weights = None if columns is None else torch.linspace(0, 1.5, columns)
    kwargs = {"weights": weights, "mode": mode, "scale": scale}
    got = group_advantages(rewards.to(triton_device), group_size, backend="triton", **kwargs)
    torch.testing.assert_close(got.cpu(), group_advantages(rewards, group_size, backend="torch", **kwargs))
    assert got[:group_size].eq(0).all()


def test_rewards_instead_of_advantages(make_problem, triton_device):
    _, given = move(make_problem(vocabulary=37), triton_device)
    logits = (given.hidden @ given.weight.t()).detach()
    rewards = torch.tensor([1.0, 2.0, 0.5, 0.25], device=triton_device)
    kwargs = {"cu_seqlens": given.cu_seqlens, "old_log_probs": given.old_log_probs, "backend": "triton"}
    got = grpo_loss(logits, given.token_ids, rewards=rewards, group_size=2, **kwargs)
    expected = grpo_loss(logits, given.token_ids, group_advantages(rewards, 2, backend="torch"), **kwargs)
    assert got.loss == expected.loss


def test_ids_outside_of_the_vocabulary_touch_no_memory(triton_device):
    """On a GPU ids are not looked at beforehand; a bad one has probability 0."""
    if triton_device == "cpu":
        pytest.skip("on the CPU they are refused")
    logits = torch.randn(2, 37, device=triton_device)
    ids = torch.tensor([10**9, -5], device=triton_device)
    assert (
        grpo_loss(logits, ids, torch.ones(1, device=triton_device), cu_seqlens=torch.tensor([0, 2]))
        .log_probs.isneginf()
        .all()
    )


@pytest.mark.parametrize("linear", [False, True])
def test_row_vectors_of_any_stride(make_problem, triton_device, linear):
    _, given = move(make_problem(vocabulary=37, lengths=(4, 2, 1, 6)), triton_device)
    function, inputs = linear_grpo_loss, (given.hidden, given.weight)
    if not linear:
        function, inputs = grpo_loss, ((given.hidden @ given.weight.t()).detach(),)
    names = ("token_ids", "old_log_probs", "ref_log_probs", "mask")
    rows = {name: getattr(given, name) for name in names}
    vectors = rows | {"advantages": given.advantages, "importance_ratios": given.advantages.abs()}

    def loss(**arguments):
        return function(*inputs, cu_seqlens=given.cu_seqlens, beta=0.1, backend="triton", **arguments).loss

    strided = {name: torch.stack([value, value], dim=1)[:, 0] for name, value in vectors.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    assert torch.equal(loss(**strided), loss(**vectors))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(make_problem, triton_device, backend):
    _, given = move(make_problem(vocabulary=37), triton_device)
    inputs = (given.hidden, given.weight)
    kwargs = {"cu_seqlens": given.cu_seqlens, "backend": backend}
    runs = []
    for enabled in (False, True):
        with torch.autocast(triton_device, torch.bfloat16, enabled=enabled):
            loss = linear_grpo_loss(*inputs, given.token_ids, given.advantages, **kwargs).loss
            loss = loss + linear_selective_log_softmax(*inputs, given.token_ids, backend=backend).mean()
        runs.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
