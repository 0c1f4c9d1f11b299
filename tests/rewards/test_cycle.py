import pytest
import torch

from fastcorl.quickstart.grammar import scene_tuples
from fastcorl.rewards import CaptionReward, TupleSimilarity, cycle_reward


class Fixed:
    """A similarity that returns what it is given."""

    def __init__(self, *scores, low=0.0, high=1.0):
        self.scores, self.range = list(scores), (low, high)

    def __call__(self, references, candidates):
        return self.scores


def test_a_caption_is_compared_with_the_rows_own_prompt(make_rollout):
    drawn = [
        "a red three at top left",  # all 3 tuples of prompt 0
        "a red three at top right",  # 2 of 3
        "a red three at top left",  # none of prompt 1's
        "a blue two at top right",  # 3 of prompt 1's 6
    ]
    reward = CaptionReward(lambda pixels: drawn, [TupleSimilarity(scene_tuples)])
    torch.testing.assert_close(reward(make_rollout()), torch.tensor([1.0, 2 / 3, 0.0, 2 * 3 / (6 + 3)]))


def test_several_similarities_are_averaged(make_rollout):
    similarities = [Fixed(1, 0, 0.5, float("nan")), Fixed(0, -1, 0.5, 1, low=-1.0)]
    raw = CaptionReward(lambda pixels: [""] * 4, similarities, unit=False)(make_rollout())
    torch.testing.assert_close(raw, torch.tensor([0.5, -0.5, 0.5, torch.nan]), equal_nan=True)
    unit = CaptionReward(lambda pixels: [""] * 4, similarities)(make_rollout())
    torch.testing.assert_close(unit, torch.tensor([0.75, 0.0, 0.625, torch.nan]), equal_nan=True)


@pytest.mark.parametrize(("halve", "expected"), [(True, [1.0, 0.75]), (False, [2.0, 1.5])])
def test_cycle_joins_its_parts_and_nan_spreads(halve, expected):
    perceptual, caption = torch.tensor([1.0, 1.0, 0.0, torch.nan]), torch.tensor([1.0, 0.5, torch.nan, 0.0])
    cycle = cycle_reward(perceptual, caption, halve=halve)
    torch.testing.assert_close(cycle, torch.tensor([*expected, torch.nan, torch.nan]), equal_nan=True)
