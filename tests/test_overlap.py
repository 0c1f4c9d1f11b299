"""Training with rewards beside sampling and the reference's forward is training without."""

import threading

import pytest
import torch

from bench.step_problems import FixedPrompts
from fastcorl.config import Config
from fastcorl.errors import UserError
from fastcorl.parts import overlaps
from fastcorl.rewards import RewardModels
from fastcorl.runtime.distributed import Distributed
from fastcorl.trainer import Trainer
from tests.helpers import make_policy, make_prompts


def make_trainer(overlap, task="unified", **algorithm):
    config = Config(
        rollout={"guidance": 5.0, "max_new_tokens": 24, "overlap": overlap},
        algorithm={"group_size": 4, "beta": 0.05, **algorithm},
        rewards={"caption_similarity": ["soft_jaccard"]},
        packing={"tokens": 800},
        stages={"stage": {"task": task, "prompts_per_step": 5}},
    )
    policy, models = make_policy(), RewardModels(config.rewards)
    prompts, ranks = FixedPrompts(make_prompts()), Distributed(0, 1, policy.device)
    return Trainer(config, "stage", config.stages["stage"], policy, models, prompts, ranks, launched=False)


def run(trainer, steps=2):
    records = [trainer.train_step(step)[0] for step in range(1, steps + 1)]
    trainer.collector.rewards.models.close()
    weights = [weight.detach().clone() for _, weight in trainer.objective.policy.trained_parameters()]
    return records, weights


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"task": "t2i"},
        {"task": "alternate"},
        {"external": True},
        {"reference": "swap"},
        {"advantage_mode": "normalize_then_sum", "num_iterations": 2},
    ],
)
def test_steps_are_bit_identical(algorithm):
    ours, weights = run(make_trainer("on", **algorithm))
    theirs, expected = run(make_trainer("off", **algorithm))
    assert all(map(torch.equal, weights, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.metrics.pop("score_hidden_seconds") >= 0
        assert one.rewards == other.rewards
        for name in ("loss", "grad_norm", "unscored_rows", "flat_groups"):
            assert one.metrics[name] == other.metrics[name]
        assert set(one.seconds) == set(other.seconds) and "score" in one.seconds


def test_rewards_go_on_while_the_reference_runs():
    trainer, reached = make_trainer("on"), threading.Event()
    suite, add_log_probs = trainer.collector.rewards, trainer._add_log_probs
    perceptual, waited = suite.drawing_rewards["perceptual"], []

    def patient(rollout):
        assert rollout.texts is None  # begun before the answers were whole
        waited.append(reached.wait(20))
        return perceptual(rollout)

    def announced(*args):
        reached.set()
        add_log_probs(*args)

    suite.drawing_rewards["perceptual"], trainer._add_log_probs = patient, announced
    (record,), _ = run(trainer, steps=1)
    assert waited == [True] and record.metrics["score_hidden_seconds"] > 0


def test_a_failing_reward_ends_the_step():
    trainer = make_trainer("on")

    def fail(rollout):
        raise UserError("rewards.image_similarity: no")

    trainer.collector.rewards.drawing_rewards["perceptual"] = fail
    with pytest.raises(UserError, match="^rewards.image_similarity: no$"):
        trainer.train_step(1)
    trainer.collector.rewards.models.close()


def test_auto_is_on_for_cuda_alone():
    config = Config(stages={"stage": {"task": "unified"}})
    assert config.rollout.overlap == "auto"
    assert overlaps(config, torch.device("cuda", 1)) and not overlaps(config, torch.device("cpu"))
    for yaml, meant in ((True, "on"), (False, "off"), ("on", "on")):
        assert Config(rollout={"overlap": yaml}, stages=config.stages).rollout.overlap == meant
    config.rollout.overlap = "on"
    assert overlaps(config, torch.device("cpu"))
