"""However a step is cut into micro-batches and ranks, its loss and gradients are the same."""

import dataclasses

import pytest
import torch

from fastcorl.algorithm import CoRLObjective, PackOptions, StepTotals, pack_rollout, packed_log_probs
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl_kernels import grpo_loss
from tests.helpers import NUM_IMAGE_TOKENS, objective_options

LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo", "cispo"]
PARAMETERS = [
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.1.mlp.down_proj.weight",
    "lm_head.weight",
]


def advantages_of(rollout):
    return torch.randn(rollout.num_rows, generator=torch.Generator().manual_seed(rollout.num_rows))


def totals_of(*rollouts):
    """What the trainer computes: sizes averaged over ranks."""
    ranks = len(rollouts)
    rows = sum(rollout.num_rows for rollout in rollouts) / ranks
    codes = sum(rollout.images.tokens.numel() for rollout in rollouts) / ranks
    words = sum(int(rollout.texts.lengths.sum()) for rollout in rollouts) / ranks
    return StepTotals({"image": rows, "text": rows}, {"image": codes, "text": words})


def pack(rollout, advantages, options, tokens, *, share_prefix=True):
    """Micro-batches with the log-probs of another policy as old ones and of yet another as reference."""
    pack_options = PackOptions(tokens, options.guided, share_prefix=share_prefix)
    batches = pack_rollout(rollout, advantages, pack_options)
    for batch in batches:
        for rows in (batch.image, batch.text):
            if rows is not None:
                rows.old_log_probs = rows.sampled_log_probs + 0.3 * torch.sin(rows.targets.float())
                rows.ref_log_probs = rows.sampled_log_probs + 0.2 * torch.cos(rows.targets.float())
    return batches


def loss_and_gradients(policy, batches, options, totals):
    objective = CoRLObjective(policy, options)
    loss = sum(objective(batch, totals)[0] for batch in batches)
    parameters = [policy.janus.get_parameter(name) for name in PARAMETERS]
    return loss.detach(), torch.autograd.grad(loss, parameters)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for name, one, other in zip(PARAMETERS, ours[1], theirs[1], strict=True):
        scale = float(other.abs().max())
        assert scale > 1e-6, name
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4 * scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("policy_logits", ["cond", "cfg"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(policy, rollout_of, loss_type, importance, policy_logits, share_prefix):
    rollout = rollout_of(5.0, 1.0)
    options = objective_options(
        loss_type=loss_type,
        importance=importance,
        policy_logits=policy_logits,
        guidance=5.0,
        eps_low=0.2,
        eps_high=0.2,
        beta=0.04,
    )
    advantages, totals = advantages_of(rollout), totals_of(rollout)
    one = pack(rollout, advantages, options, 10_000, share_prefix=False)
    many = pack(rollout, advantages, options, 150, share_prefix=share_prefix)
    assert len(one) == 1 and len(many) > 4
    assert_same(loss_and_gradients(policy, many, options, totals), loss_and_gradients(policy, one, options, totals))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ranks_average_to_one(policy, prompts, loss_type):
    engine, params = RolloutEngine(policy), SamplingParams(1.0, 5.0, 24)
    options = objective_options(loss_type=loss_type, guidance=5.0, eps_low=0.2, eps_high=0.2, beta=0.04)
    whole, *parts = (engine.generate(part, 2, params, seed=1) for part in (prompts[:4], prompts[:2], prompts[2:4]))
    advantages = advantages_of(whole)
    shares = [advantages[:4], advantages[4:]]
    totals = totals_of(*parts)
    assert totals == dataclasses.replace(
        totals_of(whole),
        sequences={name: value / 2 for name, value in totals_of(whole).sequences.items()},
        tokens={name: value / 2 for name, value in totals_of(whole).tokens.items()},
    )
    ranks = [
        loss_and_gradients(policy, pack(part, share, options, 200), options, totals)
        for part, share in zip(parts, shares, strict=True)
    ]
    mean = (
        sum(loss for loss, _ in ranks) / 2,
        [sum(pair) / 2 for pair in zip(*(each for _, each in ranks), strict=True)],
    )
    expected = loss_and_gradients(policy, pack(whole, advantages, options, 10_000), options, totals_of(whole))
    assert_same(mean, expected)


def test_the_loss_is_the_sum_of_both_modalities(policy, rollout_of):
    """Against the formula: -mean over sequences of the mean over tokens of A * ratio, ratio 1, image plus text."""
    rollout = rollout_of(5.0, 1.0)
    advantages = advantages_of(rollout)
    options = objective_options(guidance=5.0)
    (batch,) = pack_rollout(rollout, advantages, PackOptions(10_000))
    loss, losses = CoRLObjective(policy, options)(batch, totals_of(rollout))
    torch.testing.assert_close(loss.detach(), -2 * advantages.mean(), rtol=1e-4, atol=1e-5)
    for modality, result in losses.items():
        torch.testing.assert_close(result.loss.detach(), -advantages.mean(), rtol=1e-4, atol=1e-5)
        expected = packed_log_probs(policy, batch, options)[modality]
        torch.testing.assert_close(result.log_probs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy_logits", ["cond", "cfg", "cfg_detach_uncond"])
def test_the_gradient_is_that_of_the_logits(policy, rollout_of, policy_logits):
    """Guided logits written out, gradients through both branches or through the conditional one alone."""
    rollout = rollout_of(5.0, 1.0)
    advantages = advantages_of(rollout)
    options = objective_options(guidance=5.0, policy_logits=policy_logits, temperature=0.7)
    (batch,) = pack_rollout(rollout, advantages, PackOptions(10_000, options.guided))
    ours = loss_and_gradients(policy, [batch], options, totals_of(rollout))
    hidden = policy.hidden_states(batch)
    logits = {"text": policy.text_head(hidden[batch.text.positions])}
    cond = policy.janus.model.generation_head(hidden[batch.image.positions])
    if options.guided:
        uncond = policy.janus.model.generation_head(hidden[batch.image.uncond_positions])
        if policy_logits == "cfg_detach_uncond":
            uncond = uncond.detach()
        cond = uncond + 5 * (cond - uncond)
    logits["image"] = cond
    loss = sum(
        grpo_loss(
            each,
            getattr(batch, modality).targets,
            getattr(batch, modality).advantages,
            cu_seqlens=getattr(batch, modality).cu_seqlens,
            temperature=0.7,
            eps_low=None,
            eps_high=None,
        ).loss
        for modality, each in logits.items()
    )
    gradients = torch.autograd.grad(loss, [policy.janus.get_parameter(name) for name in PARAMETERS])
    assert_same(ours, (loss.detach(), gradients))


def test_only_what_is_trained_gets_a_gradient(policy, rollout_of):
    rollout = rollout_of(5.0, 1.0)
    options = objective_options(guidance=5.0, policy_logits="cfg")
    batches = pack(rollout, advantages_of(rollout), options, 10_000)
    loss, _ = CoRLObjective(policy, options)(batches[0], totals_of(rollout))
    loss.backward()
    try:
        for name, parameter in policy.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
    finally:
        policy.zero_grad(set_to_none=True)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone(policy, prompts, loss_type, modality):
    params = SamplingParams(1.0, 5.0, 24)
    rollout = RolloutEngine(policy).generate(
        prompts, 2, params, draw=modality == "image", answer=modality == "text", seed=1
    )
    tokens = 2.0 * len(prompts) * NUM_IMAGE_TOKENS if modality == "image" else float(rollout.texts.lengths.sum())
    totals = StepTotals({"image": 10.0, "text": 10.0}, {"image": 0.0, "text": 0.0} | {modality: tokens})
    options = objective_options(loss_type=loss_type, guidance=5.0, eps_high=0.2)
    advantages = advantages_of(rollout)
    (batch,) = pack_rollout(rollout, advantages, PackOptions(10_000))
    loss, losses = CoRLObjective(policy, options)(batch, totals)
    assert list(losses) == [modality] and loss.isfinite() and loss.requires_grad
