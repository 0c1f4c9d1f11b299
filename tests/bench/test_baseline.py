"""The baseline computes what fastcorl computes: log-probs, loss, gradients and rewards of the same samples."""

from copy import deepcopy

import pytest
import torch

from bench.baselines.plain_rewards import plain_rewards
from bench.baselines.plain_trainer import PlainSettings, PlainTrainer, normalised
from fastcorl.algorithm import CoRLObjective, PackOptions, StepTotals, pack_rollout, packed_log_probs
from fastcorl.config_rewards import RewardsConfig
from fastcorl.model import Policy
from fastcorl.rewards import RewardModels, RewardSuite
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl_kernels import group_advantages
from tests.helpers import NUM_IMAGE_TOKENS, make_policy, objective_options

GROUP_SIZE = 2
MAX_NEW_TOKENS = 24
REWARDS = RewardsConfig(caption_similarity=["soft_jaccard"], accuracy="soft_jaccard")


def plain_janus(policy):
    janus = deepcopy(policy.janus)
    janus.set_attn_implementation("sdpa")
    return janus


def make_trainer(policy, *, reference=None, **changes):
    janus = plain_janus(policy)
    settings = PlainSettings(**{"group_size": GROUP_SIZE, "guidance": 1.0, "max_new_tokens": MAX_NEW_TOKENS} | changes)
    rewards = plain_rewards(REWARDS, janus, policy.processor)
    return PlainTrainer(janus, policy.processor, rewards, settings, reference and plain_janus(reference))


@pytest.fixture(scope="module")
def rollout(policy, prompts):
    params = SamplingParams(1.0, 1.0, MAX_NEW_TOKENS)
    rollout = RolloutEngine(policy).generate(prompts, GROUP_SIZE, params, seed="baseline")
    assert len(set(rollout.texts.lengths.tolist())) > 2 and rollout.texts.finished.any()
    return rollout


@pytest.fixture(scope="module")
def advantages(rollout):
    return torch.randn(rollout.num_rows, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference():
    """A policy some way off."""
    policy = make_policy()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in policy.trained_parameters():
            weight.add_(0.1 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return policy


def ours(policy, rollout, advantages, *, beta=0.0, reference: Policy | None = None):
    """Loss and gradients by name from packs with shared prefixes."""
    options = objective_options(beta=beta)
    sizes = dict.fromkeys(("image", "text"), float(rollout.num_rows))
    tokens = {"image": float(rollout.images.tokens.numel()), "text": float(rollout.texts.lengths.sum())}
    objective, loss = CoRLObjective(policy, options), 0.0
    for batch in pack_rollout(rollout, advantages, PackOptions(400)):
        if reference is not None:
            for modality, log_probs in packed_log_probs(reference, batch, options).items():
                getattr(batch, modality).ref_log_probs = log_probs
        loss = loss + objective(batch, StepTotals(sizes, tokens))[0]
    named = dict(policy.trained_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    return loss.detach(), {
        name.removeprefix("janus."): gradient for name, gradient in zip(named, gradients, strict=True)
    }


@pytest.mark.parametrize("rows", [2, 6, 100])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_and_gradients_are_ours(policy, reference, rollout, advantages, beta, rows):
    """Micro-batches of one prompt, of several with different paddings, and of all."""
    reference = reference if beta else None
    trainer = make_trainer(policy, beta=beta, rows=rows, reference=reference)
    loss, gradients = trainer.loss_and_gradients(rollout, advantages)
    expected, expected_gradients = ours(policy, rollout, advantages, beta=beta, reference=reference)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        assert scale > 1e-6, name
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_kl_and_each_modality_count(policy, reference, rollout, advantages):
    """What the comparison above would not notice if both sides lacked it."""
    plain, _ = make_trainer(policy).loss_and_gradients(rollout, advantages)
    with_kl, _ = make_trainer(policy, beta=0.5, reference=reference).loss_and_gradients(rollout, advantages)
    torch.testing.assert_close(plain, -2 * advantages.mean(), rtol=1e-4, atol=1e-5)
    assert float(with_kl) > float(plain) + 0.01


def test_rewards_are_ours(policy, rollout):
    expected = RewardSuite(REWARDS, RewardModels(REWARDS), policy, RolloutEngine(policy))(rollout)
    scores = plain_rewards(REWARDS, plain_janus(policy), policy.processor)(rollout)
    assert scores.parts.keys() == expected.parts.keys() and scores.weights == expected.weights
    assert float(expected.total.std()) > 0.01
    for name, values in scores.parts.items():
        torch.testing.assert_close(values, expected.parts[name], rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(
        normalised(scores.total, GROUP_SIZE), group_advantages(expected.total, GROUP_SIZE), rtol=2e-2, atol=1e-3
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_it_samples_the_same_drawings_and_answers(policy, prompts, guidance):
    """Nearly without noise, since a low temperature leaves one token."""
    cold = 1e-4
    trainer = make_trainer(policy, guidance=guidance, temperature=cold, rows=100)
    sampled = trainer.step(prompts[:4]).samples
    params = SamplingParams(0.0, guidance, MAX_NEW_TOKENS)
    expected = RolloutEngine(policy).generate(prompts[:4], GROUP_SIZE, params)
    assert torch.equal(sampled.images.tokens, expected.images.tokens)
    torch.testing.assert_close(sampled.images.pixels, expected.images.pixels, rtol=0, atol=1e-5)
    assert sampled.texts.answers == expected.texts.answers
    assert sampled.texts.lengths.tolist() == expected.texts.lengths.tolist()


def test_a_step_updates_what_is_trained_by_its_own_gradients(policy, prompts):
    torch.manual_seed(0)
    trainer = make_trainer(policy, rows=4, learning_rate=1e-3, max_grad_norm=1e9)
    janus, start = trainer.janus, deepcopy(trainer.janus.state_dict())
    result = trainer.step(prompts[:4])
    assert result.samples.num_rows == len(result.rewards) == 8
    assert result.samples.images.tokens.shape == (8, NUM_IMAGE_TOKENS)
    assert result.seconds.keys() == {"rollout", "score", "train"}
    fresh = make_trainer(policy)
    loss, gradients = fresh.loss_and_gradients(result.samples, normalised(result.rewards, GROUP_SIZE))
    assert result.loss == pytest.approx(float(loss), abs=1e-5)
    for name, weight in janus.state_dict().items():
        moved = weight - start[name]
        if name not in gradients:
            assert not moved.any(), name
        else:  # AdamW's first step is the gradient's sign
            clear = gradients[name].abs() > 1e-3 * gradients[name].abs().max()
            assert torch.equal(moved[clear].sign(), -gradients[name][clear].sign()), name


def test_what_cannot_be(policy, prompts):
    with pytest.raises(ValueError, match="reference"):
        make_trainer(policy, beta=0.1)
    with pytest.raises(ValueError, match="3 prompts"):
        make_trainer(policy, rows=4).step(prompts[:3])
