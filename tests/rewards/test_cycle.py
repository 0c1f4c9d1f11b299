import torch

from fastcorl.quickstart.grammar import scene_tuples
from fastcorl.rewards import CaptionReward, CycleReward, PerceptualReward, VQFeatures


def test_cycle_is_the_mean_of_its_parts(encoder, captioner, make_rollout):
    perceptual = PerceptualReward(VQFeatures(encoder))
    caption = CaptionReward(captioner, scene_tuples)
    rollout = make_rollout()
    scores = CycleReward(perceptual, caption).score(rollout)
    assert torch.equal(scores.perceptual, perceptual(rollout))
    assert torch.equal(scores.caption, caption(rollout))
    assert torch.equal(scores.cycle, (scores.perceptual + scores.caption) / 2)
    assert torch.equal(CycleReward(perceptual, caption)(rollout), scores.cycle)


def test_a_perfect_drawing_scores_1_and_nan_spreads(make_rollout):
    def perceptual(rollout):
        return torch.tensor([1.0, 1.0, 0.0, torch.nan])

    def caption(rollout):
        return torch.tensor([1.0, 0.5, torch.nan, 0.0])

    cycle = CycleReward(perceptual, caption)(make_rollout())
    torch.testing.assert_close(cycle, torch.tensor([1.0, 0.75, torch.nan, torch.nan]), equal_nan=True)
