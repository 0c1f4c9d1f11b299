import pytest
import torch

from fastcorl_kernels import GRPOLoss, group_advantages, grpo_loss

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
CLIPS = [{"eps_low": 0.2, "eps_high": 0.28}, {"eps_low": None}, {"delta": 1.1}, {"eps_high": 0.5, "delta": 1.6}]
LOSSES_AND_CLIPS = [(loss, clip) for loss in LOSS_TYPES for clip in CLIPS if loss != "cispo" or "delta" not in clip]


def logits_of(problem):
    return (problem.hidden @ problem.weight.t() + problem.bias).detach().requires_grad_()


def simple(log_ratio, advantage, **kwargs):
    """One row of two tokens whose log-ratio is as given: (result, gradient of the log-probability)."""
    logits = torch.zeros(1, 2, requires_grad=True)
    old = torch.log(torch.tensor([0.5])) - log_ratio
    result = grpo_loss(
        logits,
        torch.tensor([0]),
        torch.tensor([advantage]),
        cu_seqlens=torch.tensor([0, 1]),
        old_log_probs=old,
        **kwargs,
    )
    result.loss.backward()
    return result, logits.grad[0, 0].item() * 2


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("loss_type", "clip"), LOSSES_AND_CLIPS, ids=str)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_matches_the_loops(make_problem, loop_grpo_loss, loss_type, importance, clip, beta, old, masked, per_row):
    p = make_problem(masked=masked)
    logits = logits_of(p)
    arguments = {
        "cu_seqlens": p.cu_seqlens,
        "old_log_probs": p.old_log_probs if old else None,
        "ref_log_probs": p.ref_log_probs,
        "mask": p.mask,
        "temperature": 0.7,
        "beta": beta,
        "loss_type": loss_type,
        "importance": importance,
        "normalizer": 21 if loss_type == "dr_grpo" else None,
        **clip,
    }
    advantages = p.row_advantages if per_row else p.advantages
    result = grpo_loss(logits, p.token_ids, advantages, **arguments)
    expected = loop_grpo_loss(logits, p.token_ids, advantages, **arguments)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (result.loss, expected)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("normalizer", [37, 37.0, torch.tensor(37), torch.tensor([37.0])])
def test_normalizer_replaces_the_denominator(make_problem, loop_grpo_loss, loss_type, normalizer):
    p = make_problem()
    logits = logits_of(p)
    kwargs = {"cu_seqlens": p.cu_seqlens, "mask": p.mask, "loss_type": loss_type}
    got = grpo_loss(logits, p.token_ids, p.advantages, normalizer=normalizer, **kwargs).loss
    torch.testing.assert_close(got, loop_grpo_loss(logits, p.token_ids, p.advantages, normalizer=37, **kwargs))


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_gradcheck(make_problem, importance, clip):
    p = make_problem(lengths=(2, 0, 3), vocabulary=4)

    def loss(logits):
        return grpo_loss(
            logits,
            p.token_ids,
            p.advantages,
            cu_seqlens=p.cu_seqlens,
            old_log_probs=p.old_log_probs,
            ref_log_probs=p.ref_log_probs,
            mask=p.mask,
            beta=0.1,
            importance=importance,
            **clip,
        ).loss

    assert torch.autograd.gradcheck(loss, logits_of(p))


def test_metrics(make_problem):
    p = make_problem()
    logits, keep = logits_of(p).detach(), p.mask
    result = grpo_loss(
        logits,
        p.token_ids,
        p.advantages,
        cu_seqlens=p.cu_seqlens,
        old_log_probs=p.old_log_probs,
        ref_log_probs=p.ref_log_probs,
        mask=keep,
        temperature=0.7,
    )
    assert isinstance(result, GRPOLoss)
    categorical = torch.distributions.Categorical(logits=logits / 0.7)
    log_probs = categorical.log_prob(p.token_ids)
    torch.testing.assert_close(result.log_probs, log_probs.where(keep, torch.zeros(())))
    torch.testing.assert_close(result.entropy, categorical.entropy()[keep].mean())
    gap = (p.ref_log_probs - log_probs)[keep]
    torch.testing.assert_close(result.kl, (gap.exp() - gap - 1).mean())
    ratio = (log_probs - p.old_log_probs).exp()[keep]
    advantages = p.advantages.repeat_interleave(p.cu_seqlens.diff())[keep]
    clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert clipped.any() and not clipped.all()
    torch.testing.assert_close(result.clip_fraction, clipped.double().mean())
    torch.testing.assert_close(result.ratio_max, ratio.max())


def test_metrics_are_detached_and_kl_needs_a_reference(make_problem):
    p = make_problem()
    result = grpo_loss(logits_of(p), p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens)
    assert result.loss.requires_grad and result.kl is None and result.ratio_max == 1 and result.clip_fraction == 0
    assert not any(t.requires_grad for t in (result.log_probs, result.entropy, result.clip_fraction, result.ratio_max))


def test_only_the_logits_get_a_gradient(make_problem):
    p = make_problem()
    others = [t.clone().requires_grad_() for t in (p.advantages, p.old_log_probs, p.ref_log_probs)]
    grpo_loss(
        logits_of(p),
        p.token_ids,
        others[0],
        cu_seqlens=p.cu_seqlens,
        old_log_probs=others[1],
        ref_log_probs=others[2],
        beta=0.1,
    ).loss.backward()
    assert all(t.grad is None for t in others)


@pytest.mark.parametrize("columns", [(), (2,)])
def test_rewards_instead_of_advantages(make_problem, columns):
    p = make_problem(lengths=(2, 3, 1, 4))
    rewards = torch.randn(4, *columns, generator=torch.Generator().manual_seed(3))
    kwargs = {"cu_seqlens": p.cu_seqlens, "mask": p.mask}
    fused = grpo_loss(logits_of(p), p.token_ids, rewards=rewards, group_size=2, **kwargs).loss
    assert torch.equal(fused, grpo_loss(logits_of(p), p.token_ids, group_advantages(rewards, 2), **kwargs).loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_garbage_on_masked_rows_changes_nothing(make_problem, loss_type, importance):
    p = make_problem()
    drop = ~p.mask
    assert drop.any()

    def run(logits, ids, old, ref, advantages):
        logits = logits.requires_grad_()
        result = grpo_loss(
            logits,
            ids,
            advantages,
            cu_seqlens=p.cu_seqlens,
            old_log_probs=old,
            ref_log_probs=ref,
            mask=p.mask,
            beta=0.1,
            loss_type=loss_type,
            importance=importance,
            normalizer=9,
        )
        result.loss.backward()
        return [*vars(result).values(), logits.grad]

    clean = run(logits_of(p).detach(), p.token_ids, p.old_log_probs, p.ref_log_probs, p.row_advantages)
    for bad, bad_id in ((float("nan"), -100), (float("inf"), 10**9), (-1e30, 0)):
        dirty = [t.detach().clone() for t in (logits_of(p), p.token_ids, p.old_log_probs, p.ref_log_probs)]
        dirty.append(p.row_advantages.clone())
        for tensor in dirty:
            tensor[drop] = bad_id if tensor.dtype == torch.long else bad
        got = run(*dirty)
        assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))
        assert got[-1][drop].eq(0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_no_row_counts(make_problem, loss_type, importance):
    p = make_problem()
    logits = logits_of(p)
    for mask, rows, bounds in ((torch.zeros(11, dtype=torch.bool), 11, p.cu_seqlens), (None, 0, torch.zeros(5).long())):
        result = grpo_loss(
            logits[:rows],
            p.token_ids[:rows],
            p.advantages,
            cu_seqlens=bounds,
            mask=mask,
            loss_type=loss_type,
            importance=importance,
            normalizer=3 if loss_type == "dr_grpo" else None,
        )
        assert torch.autograd.grad(result.loss, logits)[0].eq(0).all()
        for value in (result.loss, result.entropy, result.clip_fraction, result.ratio_max):
            assert value == 0


def test_an_overflowing_ratio_that_the_clip_replaces():
    result, gradient = simple(200.0, 1.0)
    assert result.loss.item() == pytest.approx(-1.2) and gradient == 0
    assert result.ratio_max == float("inf") and result.clip_fraction == 1


@pytest.mark.parametrize("kwargs", [{}, {"eps_low": None}, {"delta": 3.0}, {"loss_type": "cispo"}], ids=str)
def test_an_overflowing_ratio_with_advantage_zero(kwargs):
    result, gradient = simple(200.0, 0.0, **kwargs)
    assert result.loss == 0 and gradient == 0 and result.clip_fraction == 0


@pytest.mark.parametrize("eps_low", [0.2, None])
def test_delta_stops_an_overflowing_ratio_of_negative_advantage(eps_low):
    result, gradient = simple(200.0, -1.0, eps_low=eps_low, delta=3.0)
    assert result.loss.item() == pytest.approx(3.0) and gradient == 0


def test_an_overflowing_ratio_that_is_selected_shows():
    assert simple(200.0, -1.0)[0].loss == float("inf")


def test_an_overflowing_sequence_ratio_that_the_clip_replaces(make_problem):
    p = make_problem(masked=False)
    old = p.old_log_probs.clone()
    old[1] = -4000.0
    logits = logits_of(p)
    kwargs = {"cu_seqlens": p.cu_seqlens, "importance": "sequence", "old_log_probs": old}
    result = grpo_loss(logits, p.token_ids, torch.ones(4), **kwargs)
    gradient = torch.autograd.grad(result.loss, logits)[0]
    assert result.ratio_max == float("inf") and result.loss.isfinite() and gradient.isfinite().all()
    assert gradient[:4].eq(0).all() and gradient[4:].ne(0).any()


def test_an_overflowing_kl_counts_only_with_beta():
    far = torch.tensor([200.0])
    result, gradient = simple(0.0, 1.0, ref_log_probs=far)
    assert result.kl == float("inf") and result.loss.item() == pytest.approx(-1.0) and gradient == pytest.approx(-1.0)
    assert simple(0.0, 1.0, ref_log_probs=far, beta=0.1)[0].loss == float("inf")


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value", "moves"),
    [
        (0.5, 1.0, -1.25, False),
        (0.5, -1.0, 1.6487, True),
        (-0.5, 1.0, -0.6065, True),
        (-0.5, -1.0, 0.75, False),
        (0.0, 1.0, -1.0, True),
    ],
)
def test_the_clip_acts_on_one_side_of_each_sign(log_ratio, advantage, value, moves):
    result, gradient = simple(log_ratio, advantage, eps_low=0.25, eps_high=0.25)
    assert result.loss.item() == pytest.approx(value, rel=1e-4) and (gradient != 0) == moves
    assert result.clip_fraction == float(not moves)


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.3, 1.0), (-0.3, -1.0)])
def test_a_ratio_on_the_edge_of_the_clip_still_moves(log_ratio, advantage):
    ratio = simple(log_ratio, advantage)[0].ratio_max.item()
    # Both differences are exact, so the clip's bound is the ratio, bit for bit.
    eps = {"eps_high": ratio - 1.0} if ratio > 1 else {"eps_low": 1.0 - ratio}
    result, gradient = simple(log_ratio, advantage, **eps)
    assert result.clip_fraction == 0 and gradient == pytest.approx(-advantage * ratio, rel=1e-5)


def test_own_log_probs_make_the_ratio_exactly_one(make_problem):
    p = make_problem(dtype=torch.float32)
    for importance in ("token", "sequence"):
        result = grpo_loss(
            logits_of(p), p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens, eps_low=0.0, importance=importance
        )
        assert result.ratio_max == 1 and result.clip_fraction == 0


def test_a_forbidden_token_and_a_forbidden_vocabulary(make_problem):
    p = make_problem(masked=False)
    logits = logits_of(p).detach()
    logits[:, 5:] = float("-inf")
    logits.requires_grad_()
    ids = p.token_ids % 5
    ids[2] = 7
    old = p.old_log_probs.clone()
    for sampled in (old, None):
        for loss_type in LOSS_TYPES[:4]:
            result = grpo_loss(
                logits,
                ids,
                p.advantages,
                cu_seqlens=p.cu_seqlens,
                old_log_probs=sampled,
                loss_type=loss_type,
                normalizer=5,
            )
            gradient = torch.autograd.grad(result.loss, logits)[0]
            assert result.loss.isfinite() and result.entropy.isfinite() and gradient.isfinite().all()
            assert gradient[:, 5:7].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits(make_problem, dtype):
    p = make_problem()
    logits = logits_of(p).detach().to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    kwargs = {"cu_seqlens": p.cu_seqlens, "old_log_probs": p.old_log_probs, "mask": p.mask, "eps_high": 0.3}
    got, expected = (grpo_loss(x, p.token_ids, p.advantages, **kwargs).loss for x in (logits, exact))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.backward()
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_a_strided_view_of_the_logits(make_problem):
    p = make_problem()
    logits = logits_of(p).detach()
    padded = torch.cat([logits, torch.full((1, 11), float("nan"), dtype=torch.float64)])[:-1]
    wide = torch.stack([logits, logits * float("nan")], dim=1)[:, 0]
    losses = [
        grpo_loss(x, p.token_ids.int(), p.advantages, cu_seqlens=p.cu_seqlens.int()).loss
        for x in (logits, padded, wide)
    ]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_without_gradients(make_problem, guard, importance):
    p = make_problem()
    kwargs = {"cu_seqlens": p.cu_seqlens, "old_log_probs": p.old_log_probs, "mask": p.mask, "importance": importance}
    expected = grpo_loss(logits_of(p), p.token_ids, p.advantages, **kwargs).loss
    with guard():
        got = grpo_loss(logits_of(p), p.token_ids, p.advantages, **kwargs).loss
    assert torch.equal(got, expected) and not got.requires_grad


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("logits", {"logits": torch.zeros(11)}),
        ("token_ids", {"token_ids": torch.zeros(10, dtype=torch.long)}),
        ("token_ids", {"token_ids": torch.full((11,), 11)}),
        ("token_ids", {"token_ids": torch.zeros(11)}),
        ("advantages", {"advantages": None}),
        ("advantages", {"advantages": torch.zeros(5)}),
        ("advantages", {"advantages": torch.zeros(4, dtype=torch.long)}),
        ("advantages", {"rewards": torch.zeros(4), "group_size": 2}),
        ("group_size", {"group_size": 2}),
        ("group_size", {"advantages": None, "rewards": torch.zeros(4)}),
        ("rewards", {"advantages": None, "rewards": torch.zeros(4), "group_size": 3}),
        ("rewards", {"advantages": None, "rewards": torch.zeros(6), "group_size": 2}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 4, 5, 10])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 4, 4, 5, 11])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 4, 5, 11])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 11.0])}),
        ("cu_seqlens", {"cu_seqlens": [0, 11]}),
        ("old_log_probs", {"old_log_probs": torch.zeros(4)}),
        ("ref_log_probs", {"ref_log_probs": torch.zeros(11, 1)}),
        ("ref_log_probs", {"beta": 0.1}),
        ("mask", {"mask": torch.ones(11)}),
        ("mask", {"mask": torch.ones(4, dtype=torch.bool)}),
        ("temperature", {"temperature": 0}),
        ("beta", {"beta": -0.1}),
        ("eps_low", {"eps_low": -0.1}),
        ("eps_high", {"eps_high": None}),
        ("eps_high", {"eps_high": None, "eps_low": None, "loss_type": "cispo"}),
        ("delta", {"delta": 0.0}),
        ("delta", {"delta": 2.0, "loss_type": "cispo"}),
        ("loss_type", {"loss_type": "ppo"}),
        ("importance", {"importance": "group"}),
        ("normalizer", {"loss_type": "dr_grpo"}),
        ("normalizer", {"normalizer": 0}),
        ("normalizer", {"normalizer": torch.ones(2)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(make_problem, name, kwargs):
    p = make_problem()
    good = {
        "logits": logits_of(p),
        "token_ids": p.token_ids,
        "advantages": p.advantages,
        "cu_seqlens": p.cu_seqlens,
    }
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        grpo_loss(**(good | kwargs))
