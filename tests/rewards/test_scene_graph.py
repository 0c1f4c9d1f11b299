import math

import pytest
import torch

from fastcorl.quickstart.grammar import scene_tuples
from fastcorl.rewards import CaptionReward, tuple_f1


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ({1, 2, 3}, {1, 2, 3}, 1.0),
        ({1, 2, 3}, {4}, 0.0),
        ({1, 2, 3}, set(), 0.0),
        ({1, 2, 3}, {1}, 0.5),  # precision 1, recall 1/3
        ({1, 2}, {2, 3, 4}, 0.4),  # precision 1/3, recall 1/2
        ({("dog",), ("dog", "red")}, {("dog",), ("dog", "blue")}, 0.5),
    ],
)
def test_f1(reference, candidate, expected):
    assert tuple_f1(reference, candidate) == pytest.approx(expected)


@pytest.mark.parametrize("candidate", [set(), {1}])
def test_an_empty_reference_cannot_be_scored(candidate):
    assert math.isnan(tuple_f1(set(), candidate))


def test_reward_compares_with_the_rows_own_prompt(make_rollout):
    drawn = [
        "a red three at top left",  # all 3 tuples of prompt 0
        "a red three at top right",  # 2 of 3
        "a red three at top left",  # none of prompt 1's
        "a blue two at top right",  # 3 of prompt 1's 6
    ]
    rollout = make_rollout()
    parsed = []
    reward = CaptionReward(lambda pixels: drawn, lambda text: parsed.append(text) or scene_tuples(text))
    torch.testing.assert_close(reward(rollout), torch.tensor([1.0, 2 / 3, 0.0, 2 * 3 / (6 + 3)]))
    assert len(parsed) == 2 + 4


def test_a_caption_outside_the_grammar_is_a_nan(make_rollout):
    reward = CaptionReward(lambda pixels: ["a red three"] * 4, lambda text: set() if "blue" in text else {text})
    assert reward(make_rollout()).isnan().tolist() == [False, False, True, True]
