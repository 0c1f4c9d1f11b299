import pytest
import torch

from fastcorl.quickstart.grammar import scene_tuples
from fastcorl.rewards import CaptionReward, CycleReward, PerceptualReward, TupleSimilarity, make_image_similarity


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


@pytest.mark.parametrize("halve", [True, False])
def test_cycle_joins_its_parts(encoder, captioner, make_rollout, halve):
    perceptual = PerceptualReward(make_image_similarity("vq", vq_encoder=encoder))
    caption = CaptionReward(captioner, [TupleSimilarity(scene_tuples)])
    rollout = make_rollout()
    parts = CycleReward(perceptual, caption, halve=halve).parts(rollout)
    assert torch.equal(parts["perceptual"], perceptual(rollout))
    assert torch.equal(parts["caption"], caption(rollout))
    total = parts["perceptual"] + parts["caption"]
    assert torch.equal(parts["cycle"], total / 2 if halve else total)


def test_nan_spreads(make_rollout):
    def perceptual(rollout):
        return torch.tensor([1.0, 1.0, 0.0, torch.nan])

    def caption(rollout):
        return torch.tensor([1.0, 0.5, torch.nan, 0.0])

    cycle = CycleReward(perceptual, caption, halve=True).parts(make_rollout())["cycle"]
    torch.testing.assert_close(cycle, torch.tensor([1.0, 0.75, torch.nan, torch.nan]), equal_nan=True)
