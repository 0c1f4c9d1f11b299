"""With a feature off, the step of the benchmarks does the same work: same samples, same loss, same gradients."""

from collections import Counter

import pytest
import torch

from bench.peers.ours_step import FEATURES, OurStep
from bench.step_problems import FixedPrompts
from fastcorl.algorithm import objective
from fastcorl.config import Config
from fastcorl.model import Policy
from fastcorl.rewards import RewardModels
from fastcorl.rewards.background import Background
from fastcorl.rollout import RolloutEngine
from fastcorl.runtime.distributed import Distributed
from fastcorl.trainer import Trainer
from tests.helpers import make_policy, make_prompts

CONFIG = Config(
    rollout={"guidance": 5.0, "max_new_tokens": 24},
    algorithm={"group_size": 4},
    rewards={"caption_similarity": ["soft_jaccard"]},
    packing={"tokens": 400},
    stages={"unified": {"task": "unified", "prompts_per_step": 5}},
)


class Gradients:
    """Keeps the gradients that an optimizer step is about to use."""

    def __init__(self, engine):
        self.step, self.weights = engine.step, engine.weights
        engine.step = self

    def __call__(self, learning_rate):
        self.kept = [weight.grad.clone() for weight in self.weights]
        return self.step(learning_rate)


def one_step(feature):
    policy = make_policy()
    stage, ranks = CONFIG.stages["unified"], Distributed(0, 1, policy.device)
    prompts, models = FixedPrompts(make_prompts()), RewardModels(CONFIG.rewards)
    trainer = Trainer(CONFIG, "unified", stage, policy, models, prompts, ranks, launched=False)
    gradients, ours = Gradients(trainer.engine), OurStep(trainer)
    with ours.without(feature):
        record, rollout = ours.step()
    with ours.without(feature):  # features hold for more than one update of the weights
        _, later = ours.step()
    return record, rollout, later, gradients.kept


@pytest.fixture(scope="module")
def whole():
    return one_step(None)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_work_is_the_same(whole, feature):
    record, rollout, later, gradients = one_step(feature)
    expected_record, expected_rollout, expected_later, expected_gradients = whole
    for ours, theirs in ((rollout, expected_rollout), (later, expected_later)):
        assert torch.equal(ours.images.tokens, theirs.images.tokens)
        assert torch.equal(ours.texts.tokens, theirs.texts.tokens)
    for name in ("loss", "grad_norm", "image_mismatch", "text_mismatch"):
        assert record.metrics[name] == pytest.approx(expected_record.metrics[name], rel=1e-4, abs=1e-5), name
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()))


@pytest.fixture
def counts(monkeypatch):
    """What a step calls how often, and the positions that its backbone trains on."""
    counts = Counter()

    def count(owner, name, amount=lambda *_: 1):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] += amount(*args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    count(Policy, "hidden_states", lambda policy, batch: batch.num_tokens)
    count(Policy, "vision_features", lambda policy, pixels: len(pixels))
    count(RolloutEngine, "generate")
    count(Background, "start")
    count(objective, "linear_grpo_loss")
    return counts


def test_every_feature_is_off_when_it_is(counts):
    """A switch that did nothing would pass the test above."""
    seen = {}
    for feature in [None, *FEATURES]:
        one_step(feature)
        seen[feature] = dict(counts)
        counts.clear()
    usual = seen[None]
    assert seen["packing"]["linear_grpo_loss"] == 2 * 2 * 20  # two steps of 20 drawings and 20 answers
    assert seen["packing"]["hidden_states"] == seen["prefix sharing"]["hidden_states"] > 1.1 * usual["hidden_states"]
    assert seen["vision reuse"]["vision_features"] == usual["vision_features"] + 2 * 20
    assert seen["mixed rollout"]["generate"] == 2 * usual["generate"]
    assert "start" not in usual and seen["rewards in turn"]["start"] == 2
    assert "linear_grpo_loss" not in seen["fused loss"]
