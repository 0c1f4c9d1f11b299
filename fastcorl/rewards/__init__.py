"""Rewards: a `Rollout` in, one float per row out, NaN for a row that could not be scored.

Every reward is a callable `reward(rollout) -> (n,) float32` without gradient; `RewardSuite` is their weighted sum.
"""

from fastcorl.rewards.answers import AccuracyReward, FormatReward, extract_answer
from fastcorl.rewards.captioner import BlipCaptioner
from fastcorl.rewards.cycle import CycleReward, CycleScores
from fastcorl.rewards.perceptual import PerceptualReward, VQFeatures, lpips_distance
from fastcorl.rewards.scene_graph import CaptionReward, tuple_f1
from fastcorl.rewards.suite import RewardSuite
from fastcorl.rewards.tim import TIMReward, match_score

__all__ = [
    "AccuracyReward",
    "BlipCaptioner",
    "CaptionReward",
    "CycleReward",
    "CycleScores",
    "FormatReward",
    "PerceptualReward",
    "RewardSuite",
    "TIMReward",
    "VQFeatures",
    "extract_answer",
    "lpips_distance",
    "match_score",
    "tuple_f1",
]
