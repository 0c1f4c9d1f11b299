import dataclasses
import time
from pathlib import Path

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.rewards.users.rewards import FailureLog, RewardFailure, UserRewards

ANSWERS = ["1", "three", "", "é"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def user_functions(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def rollout(make_rollout):
    """Of two groups of three; exact bytes as pixels."""
    rollout = make_rollout(ANSWERS + ["a", "b"], group_size=3)
    rollout.images.pixels = (rollout.images.pixels * 255).round() / 255
    return rollout


def test_rewards_of_both_kinds_in_order(rollout):
    extra = ["user_functions:first_pixel", "user_functions:fails", "user_functions:answer_length"]
    with UserRewards(extra, ["user_functions:brighter", "user_functions:over_sure"]) as rewards:
        rewards.start(rollout)
        results = rewards.collect()
        assert list(results) == [*extra, "user_functions:brighter", "user_functions:over_sure"]
        pixels = rollout.images.pixels[:, 0, 0, 0]
        assert torch.equal(results["user_functions:first_pixel"].values, pixels)
        assert results["user_functions:answer_length"].values.tolist() == [1, 5, 0, 1, 1, 1]
        first = float((pixels[0] - pixels[2]).sign() + 1) / 2
        rates = results["user_functions:brighter"].values
        torch.testing.assert_close(rates[:3], torch.tensor([first, NAN, 1 - first]), equal_nan=True)
        order = pixels[3:].argsort()
        assert rates[3:][order].tolist() == [0, 0.5, 1]
        for name, reason in {
            "user_functions:fails": "RuntimeError: no judge today (user_functions.py:",
            "user_functions:over_sure": "returned 1.5 for the pair (0, 1), not a probability",
        }.items():
            assert results[name].failure.startswith(reason)
            assert results[name].values.shape == (6,)
            assert results[name].values.isnan().all()
            assert (rewards.failures.calls[name], rewards.failures.failures[name]) == (1, 1)
        for name in ("user_functions:first_pixel", "user_functions:brighter"):
            assert results[name].failure is None
            assert results[name].values.dtype == torch.float32
            assert (rewards.failures.calls[name], rewards.failures.failures[name]) == (1, 0)

        with pytest.raises(RuntimeError, match="without start"):
            rewards.collect()
        rewards.start(rollout)
        with pytest.raises(RuntimeError, match="was collected"):
            rewards.start(rollout)
        # a rollout of one modality, and groups of one
        rewards.collect()
        rewards.start(dataclasses.replace(rollout, images=None, prompts=rollout.prompts * 3, group_size=1))
        results = rewards.collect()
        assert results["user_functions:answer_length"].failure is None
        assert "AttributeError" in results["user_functions:first_pixel"].failure


def test_workers_run_at_the_same_time_as_one_another_and_the_trainer(rollout):
    with UserRewards(["user_functions:sleeps", "user_functions:sleeps_too"]) as rewards:
        started = time.monotonic()
        rewards.start(rollout)
        assert time.monotonic() - started < 1.5
        time.sleep(1)  # the trainer's own rewards
        results = rewards.collect()
        assert 2 <= time.monotonic() - started < 3.7
    for result in results.values():
        assert result.failure is None
        assert 2 <= result.seconds < 3.7


def test_a_reward_that_keeps_failing_ends_the_run(rollout):
    with UserRewards(["user_functions:fails", "user_functions:first_pixel"]) as rewards:
        for _ in range(4):
            rewards.start(rollout)
            rewards.collect()
        rewards.start(rollout)
        with pytest.raises(
            RewardFailure,
            match=r"reward user_functions:fails failed in 5 of its last 5 calls, .*RuntimeError: no judge today",
        ):
            rewards.collect()


@pytest.mark.parametrize(
    ("failed", "stops_at"),
    [
        ([True] * 4 + [False] * 4, None),
        ([True] * 5, 5),
        ([False] * 20 + [True] * 10, None),  # half is not over half
        ([False] * 20 + [True] * 11, 31),
        ([True, False] * 20, 9),  # 5 of 9
        ([False, True] * 20, None),
        ([False] * 10 + [True] * 10, None),
        ([True] * 4 + [False] * 100 + [True] * 5, None),
    ],
)
def test_when_it_is_too_many(failed, stops_at):
    log = FailureLog()
    for call, failure in enumerate(failed, start=1):
        log.record("other", None)
        log.record("mine", "broken" if failure else None)
        if call == stops_at:
            with pytest.raises(RewardFailure, match="reward mine failed .*: broken$"):
                log.check()
            break
        log.check()
    assert stops_at is None or call == stops_at
    assert log.calls["mine"] == call
    assert log.failures["mine"] == sum(failed[:call])
    assert log.failures["other"] == 0


def test_a_failure_of_a_reward_is_told_as_a_user_error():
    assert issubclass(RewardFailure, UserError)


def test_a_bad_name_is_told_with_its_key_and_leaves_no_process():
    with pytest.raises(
        UserError, match=r"^rewards\.pairwise: user_functions:nothing: 'user_functions' has no 'nothing'"
    ):
        UserRewards(["user_functions:first_pixel"], ["user_functions:nothing"])


def test_no_rewards_need_no_process(rollout):
    rewards = UserRewards()
    rewards.start(rollout)
    assert rewards.collect() == {}
    rewards.close()
