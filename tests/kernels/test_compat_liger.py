import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import fastcorl_kernels
from fastcorl_kernels.compat.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")
# Of the policy term: what varies, beyond the type of the loss.
OPTIONS = {
    "plain": {},
    "sequence": {"level": "sequence"},
    "delta": {"delta": 1.1},
    "ratio per sequence": {"vllm": (4,)},
    "ratio per sequence, column": {"vllm": (4, 1), "level": "sequence"},
    "ratio per token": {"vllm": (4, 5), "level": "sequence"},
    "own policy, no mask": {"old": False, "masked": False},
    "cap above 1": {"eps_high": 1.5},
}
GRID = [(loss_type, name) for loss_type in LOSS_TYPES for name in OPTIONS if (loss_type, name) != ("cispo", "delta")]


def make_problem(old=True, masked=True, vllm=None, level="token", delta=None, eps_high=0.3, dtype=torch.float64):
    """Four completions of five tokens: one masked throughout, one of advantage 0; ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(4, 6, 3), normal(11, 3), normal(11)
    ids = torch.randint(11, (4, 5), generator=generator)
    own = ((hidden[:, :-1] @ weight.T + bias) / 0.8).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mask = (torch.rand(4, 5, generator=generator) > 0.3).int() if masked else None
    if masked:
        mask[1] = 0
    return SimpleNamespace(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=bias.requires_grad_(),
        ids=ids,
        advantages=torch.tensor([1.3, 0.7, 0.0, -0.9], dtype=dtype),
        mask=mask,
        old=own + 0.4 * normal(4, 5) if old else None,
        ref=own + 0.4 * normal(4, 5),
        vllm=None if vllm is None else normal(*vllm).exp(),
        level=level,
        delta=delta,
        eps_high=eps_high,
        upstream=normal(4, 5),
    )


def expected_tokens(log_probs, problem, loss_type, beta):
    """Loss, k3 and whether the clip binds, (B, L) each and 0 where masked; finite inputs only."""
    keep = torch.ones_like(log_probs) if problem.mask is None else problem.mask.to(log_probs)
    log_ratio = log_probs - (log_probs.detach() if problem.old is None else problem.old)
    if problem.level == "sequence":
        mean = (log_ratio * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_probs)
    ratio, advantages = log_ratio.exp(), problem.advantages[:, None]
    if loss_type == "cispo":
        loss = -ratio.clamp(max=problem.eps_high).detach() * advantages * log_probs
        clipped = (ratio > problem.eps_high) & (advantages > 0)
    else:
        low, high = 1 - 0.2, 1 + problem.eps_high
        capped = ratio if problem.delta is None else ratio.clamp(max=problem.delta)
        loss = -torch.min(capped * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    if problem.vllm is not None:
        loss = loss * problem.vllm.reshape(4, -1)
    kl = (problem.ref - log_probs).exp() - (problem.ref - log_probs) - 1
    return (loss + beta * kl) * keep, kl * keep, clipped * keep, keep


def expected_reduced(log_probs, problem, loss_type, beta, length=5.0, items=None):
    loss, kl, clipped, keep = expected_tokens(log_probs, problem, loss_type, beta)
    count = keep.sum().clamp(min=1)
    if loss_type == "grpo":
        loss = (loss.sum(1) / keep.sum(1).clamp(min=1)).mean()
    elif loss_type == "luspo":
        loss = loss.sum(1).mean()
    else:
        tokens = items if items is not None and loss_type != "bnpo" else count
        loss = loss.sum() / (4 * length if loss_type == "dr_grpo" else tokens)
    metrics = [clipped.sum() / count]
    return loss, [kl.sum() / count, *metrics] if beta else metrics


def log_probs_of(problem, temperature=0.8):
    """(logits (4, 6, 11), log-probabilities (4, 5)), with gradients to the problem's leaves."""
    logits = problem.hidden @ problem.weight.T + problem.bias
    log_p = (logits[:, :-1] / temperature).log_softmax(-1)
    return logits, log_p.gather(-1, problem.ids[..., None])[..., 0]


def from_logits(problem, logits, loss_type, beta, **more):
    arguments = {"beta": beta, "temperature": 0.8, "eps_high": problem.eps_high, "vllm_is_ratio": problem.vllm} | more
    return triton_grpo_loss(
        logits,
        problem.old,
        problem.ref if arguments["beta"] else None,
        problem.ids,
        problem.advantages,
        problem.mask,
        loss_type=loss_type,
        importance_sampling_level=problem.level,
        delta=problem.delta,
        **arguments,
    )


def linear_module(problem, loss_type, beta, module=LigerFusedLinearGRPOLoss, **more):
    settings = {"beta": beta, "use_ref_model": beta != 0, "compiled": False, "temperature": 0.8} | more
    return module(
        loss_type=loss_type,
        epsilon_high=problem.eps_high,
        importance_sampling_level=problem.level,
        delta=problem.delta,
        max_completion_length=5,
        **settings,
    )


def linear_arguments(problem):
    mask = torch.ones_like(problem.ids) if problem.mask is None else problem.mask
    return problem.hidden[:, :-1], problem.weight, problem.ids, mask, problem.advantages, problem.bias


def leaves(problem):
    return problem.hidden, problem.weight, problem.bias


def close(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type, name", [pair for pair in GRID if pair[0] in ("dapo", "cispo")])
def test_per_token_values_and_gradients_under_any_upstream_gradient(loss_type, name, beta):
    problem = make_problem(**OPTIONS[name])
    logits, log_probs = log_probs_of(problem)
    loss, kl, clipped = from_logits(problem, logits, loss_type, beta)
    expected, expected_kl, expected_clipped, _ = expected_tokens(log_probs, problem, loss_type, beta)
    close([loss, clipped], [expected, expected_clipped])
    assert kl is None if beta == 0 else torch.allclose(kl, expected_kl, rtol=1e-9)
    close(
        torch.autograd.grad((loss * problem.upstream).sum(), leaves(problem), retain_graph=True),
        torch.autograd.grad((expected * problem.upstream).sum(), leaves(problem)),
    )


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type, name", GRID)
def test_reduced_loss_metrics_and_gradients_from_logits(loss_type, name, beta):
    problem = make_problem(**OPTIONS[name])
    logits, log_probs = log_probs_of(problem)
    loss, metrics = from_logits(problem, logits, loss_type, beta, reduce=True)
    expected, expected_metrics = expected_reduced(log_probs, problem, loss_type, beta)
    assert type(metrics) is list and not any(metric.requires_grad for metric in metrics)
    close([loss, *metrics], [expected, *expected_metrics])
    close(
        torch.autograd.grad(2.0 * loss, leaves(problem), retain_graph=True),
        torch.autograd.grad(2.0 * expected, leaves(problem)),
    )


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type, name", GRID)
def test_loss_metrics_and_gradients_from_hidden_states(loss_type, name, beta):
    problem = make_problem(**OPTIONS[name])
    module = linear_module(problem, loss_type, beta)
    loss, metrics = module(*linear_arguments(problem), problem.ref, problem.old, vllm_is_ratio=problem.vllm)
    expected, expected_metrics = expected_reduced(log_probs_of(problem)[1], problem, loss_type, beta)
    assert type(metrics) is tuple
    close([loss, *metrics], [expected, *expected_metrics])
    close(torch.autograd.grad(loss, leaves(problem)), torch.autograd.grad(expected, leaves(problem)))


@pytest.mark.parametrize("items", [7, torch.tensor(7), 0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_num_items_in_batch_replaces_the_token_count_of_dapo_and_cispo_only(loss_type, items):
    problem = make_problem()
    logits, log_probs = log_probs_of(problem)
    expected = expected_reduced(log_probs, problem, loss_type, 0.1, items=max(int(items), 1))[0]
    reduced = from_logits(problem, logits, loss_type, 0.1, reduce=True, num_items_in_batch=items)[0]
    linear = linear_module(problem, loss_type, 0.1)(
        *linear_arguments(problem), problem.ref, problem.old, num_items_in_batch=items
    )[0]
    close([reduced, linear], [expected, expected])


def test_the_token_count_is_averaged_over_processes(monkeypatch):
    problem = make_problem()
    logits, log_probs = log_probs_of(problem)
    expected = expected_reduced(log_probs, problem, "dapo", 0.0, items=7 / 2)[0]
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda count: count.fill_(7))
    for items in (None, 7):
        close([from_logits(problem, logits, "dapo", 0.0, reduce=True, num_items_in_batch=items)[0]], [expected])


def test_dr_grpo_divides_by_the_longest_allowed_completion():
    problem = make_problem()
    logits, log_probs = log_probs_of(problem)
    for given, length in ((None, 5), (9, 9)):
        loss = from_logits(problem, logits, "dr_grpo", 0.0, reduce=True, max_completion_length=given)[0]
        close([loss], [expected_reduced(log_probs, problem, "dr_grpo", 0.0, length=length)[0]])
    with pytest.raises(ValueError, match="^max_completion_length: "):
        LigerFusedLinearGRPOLoss(loss_type="dr_grpo", beta=0.0)(*linear_arguments(problem))


def test_the_reference_can_come_from_hidden_states_or_be_left_out():
    problem = make_problem()
    arguments = linear_arguments(problem)
    ref_hidden, ref_weight = torch.randn_like(problem.hidden[:, :-1]), torch.randn_like(problem.weight)
    log_p = ((ref_hidden @ ref_weight.T + problem.bias) / 0.8).log_softmax(-1)
    problem.ref = log_p.gather(-1, problem.ids[..., None])[..., 0].detach()
    module = linear_module(problem, "dapo", 0.1)
    expected, expected_metrics = expected_reduced(log_probs_of(problem)[1], problem, "dapo", 0.1)
    loss, metrics = module(
        *arguments, None, problem.old, ref_input=ref_hidden, ref_weight=ref_weight, ref_bias=problem.bias
    )
    close([loss, *metrics], [expected, *expected_metrics])

    without = linear_module(problem, "dapo", 0.1, use_ref_model=False)
    loss, (kl, clip_ratio) = without(*arguments, problem.ref, problem.old)
    expected, (expected_ratio,) = expected_reduced(log_probs_of(problem)[1], problem, "dapo", 0.0)
    close([loss, kl, clip_ratio], [expected, torch.zeros_like(expected), expected_ratio])
    with pytest.raises(ValueError, match="^ref_per_token_logps: "):
        module(*arguments, None, problem.old)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_garbage_on_masked_positions_changes_nothing(level):
    problem = make_problem(level=level, vllm=(4, 5))
    logits, log_probs = log_probs_of(problem)
    expected = expected_reduced(log_probs, problem, "dapo", 0.1)
    expected_gradient = torch.autograd.grad(expected[0], logits)[0]
    masked = problem.mask == 0
    dirty = logits.detach().clone()
    dirty[:, :-1][masked], dirty[:, -1] = torch.nan, torch.inf
    problem.old[masked], problem.ref[masked], problem.vllm[masked] = -torch.inf, torch.nan, torch.nan
    problem.ids[masked] = -100
    dirty.requires_grad_()
    loss, metrics = from_logits(problem, dirty, "dapo", 0.1, reduce=True)
    close([loss, *metrics], [expected[0], *expected[1]])
    close(torch.autograd.grad(loss, dirty), [expected_gradient])
    tokens = from_logits(problem, dirty, "dapo", 0.1)[0]
    close(torch.autograd.grad(tokens.sum() / problem.mask.sum(), dirty), [expected_gradient])


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("advantage, delta", [(1.0, None), (0.0, None), (1.0, 2.0), (-1.0, 2.0)])
def test_a_ratio_that_overflows_but_is_not_picked_gives_no_nan(advantage, delta, reduce):
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    old = torch.full((1, 2), -200.0)
    ids, advantages = torch.tensor([[1, 2]]), torch.tensor([advantage])
    output = triton_grpo_loss(logits, old, None, ids, advantages, beta=0.0, delta=delta, reduce=reduce)
    loss = output[0].mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    picked = {1.0: 1.4, 0.0: 0.0, -1.0: 2.0}[advantage]
    torch.testing.assert_close(loss.item(), -picked * advantage)
    assert not gradient.any()


def test_strided_logits_are_welcome_and_never_overwritten():
    problem = make_problem()
    logits = log_probs_of(problem)[0].detach()
    strided = torch.stack([logits, logits], dim=2)[:, :, 1].requires_grad_()
    assert not strided.is_contiguous()
    loss, _ = from_logits(problem, strided, "dapo", 0.1, reduce=True, inplace=True)
    loss.backward()
    assert torch.equal(strided, logits)
    close([loss], [from_logits(problem, logits, "dapo", 0.1, reduce=True)[0]])


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_results_are_in_the_accumulators_dtype_and_gradients_in_the_operands(dtype, expected):
    problem = make_problem(dtype=dtype)
    loss, metrics = linear_module(problem, "grpo", 0.1)(*linear_arguments(problem), problem.ref, problem.old)
    assert {loss.dtype, *(metric.dtype for metric in metrics)} == {expected}
    assert {gradient.dtype for gradient in torch.autograd.grad(loss, leaves(problem))} == {dtype}


def test_under_autocast_the_operands_are_rounded_and_the_sums_are_not():
    problem, rounded = make_problem(dtype=torch.float32), make_problem()
    module = linear_module(problem, "dapo", 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = module(*linear_arguments(problem), problem.ref, problem.old)
    for name in ("hidden", "weight", "bias"):
        setattr(rounded, name, getattr(problem, name).detach().bfloat16().double())
    expected, expected_metrics = expected_reduced(log_probs_of(rounded)[1], rounded, "dapo", 0.1)
    assert {loss.dtype, *(gradient.dtype for gradient in torch.autograd.grad(loss, leaves(problem)))} == {torch.float32}
    for ours, exact in zip([loss, *metrics], [expected, *expected_metrics], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"loss_type": "sapo"}, NotImplementedError, "loss_type"),
        ({"loss_type": "vespo"}, NotImplementedError, "loss_type"),
        ({"use_bias_correction_kl": True}, NotImplementedError, "use_bias_correction_kl"),
        ({"loss_type": "ppo"}, ValueError, "loss_type"),
        ({"delta": -1.0}, ValueError, "delta"),
    ],
)
def test_what_is_not_offered_is_named(change, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        LigerFusedLinearGRPOLoss(**change)
    with pytest.raises(error, match=f"^{name}: "):
        triton_grpo_loss(
            torch.zeros(1, 3, 4), None, None, torch.tensor([[1, 2]]), torch.ones(1), beta=0.0, reduce=True, **change
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("logits", torch.zeros(3, 4)),
        ("old_logp", torch.zeros(1, 3)),
        ("ref_logp", None),
        ("completion_ids", torch.zeros(2)),
        ("advantages", torch.zeros(2)),
        ("completion_mask", torch.zeros(1, 3)),
        ("vllm_is_ratio", torch.zeros(2)),
        ("importance_sampling_level", "word"),
    ],
)
def test_bad_arguments_are_named(name, value):
    arguments = {
        "logits": torch.zeros(1, 3, 4),
        "old_logp": None,
        "ref_logp": torch.zeros(1, 2),
        "completion_ids": torch.tensor([[1, 2]]),
        "advantages": torch.ones(1),
    }
    with pytest.raises(ValueError, match=f"^{name}: "):
        triton_grpo_loss(**(arguments | {name: value}))


def test_importing_needs_neither_library():
    code = """
import sys
import fastcorl_kernels.compat.liger, fastcorl_kernels.compat.trl
assert not {"liger_kernel", "trl", "transformers"} & set(sys.modules)
"""
    folder = str(Path(fastcorl_kernels.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folder}, check=True, timeout=60)


def defaults(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_signatures_are_ligers():
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as theirs
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss as their_function

    for ours, other in (
        (triton_grpo_loss, their_function),
        (LigerFusedLinearGRPOLoss.__init__, theirs.__init__),
        (LigerFusedLinearGRPOLoss.forward, theirs.forward),
    ):
        assert list(defaults(ours).items()) == list(defaults(other).items())


# Its luspo reads padding, and it refuses cispo with a ratio per sequence.
@pytest.mark.parametrize(
    "loss_type, name",
    [(loss, name) for loss, name in GRID if loss != "luspo" and (loss != "cispo" or "level" not in OPTIONS[name])],
)
def test_liger_agrees(loss_type, name):
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as theirs

    problem = make_problem(**OPTIONS[name], dtype=torch.float32)
    results = []
    for kind in (LigerFusedLinearGRPOLoss, theirs):
        module = linear_module(problem, loss_type, 0.1, module=kind)
        loss, metrics = module(*linear_arguments(problem), problem.ref, problem.old, vllm_is_ratio=problem.vllm)
        assert type(metrics) is tuple
        results.append([loss, *metrics, *torch.autograd.grad(loss, leaves(problem))])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
