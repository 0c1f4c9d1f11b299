"""The bidirectional cycle reward of CoRL (arXiv 2505.17534, section 3.2): does the drawing lead back to the example?"""

from typing import NamedTuple

import torch

from fastcorl.records import Rollout
from fastcorl.rewards.perceptual import PerceptualReward
from fastcorl.rewards.scene_graph import CaptionReward


class CycleScores(NamedTuple):
    """Each (n,) float32 in [0, 1]; `cycle` is the mean of the other two."""

    cycle: torch.Tensor
    perceptual: torch.Tensor
    caption: torch.Tensor


class CycleReward:
    """Mean of 1 - LPIPS(real, drawn) and SPICE(caption, BLIP(drawn)): the paper's sum, in [0, 1] as in its v3."""

    def __init__(self, perceptual: PerceptualReward, caption: CaptionReward) -> None:
        self.perceptual = perceptual
        self.caption = caption

    def score(self, rollout: Rollout) -> CycleScores:
        """The reward together with its two parts."""
        perceptual, caption = self.perceptual(rollout), self.caption(rollout)
        return CycleScores((perceptual + caption) / 2, perceptual, caption)

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return self.score(rollout).cycle
