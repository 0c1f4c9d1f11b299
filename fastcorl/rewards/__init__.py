"""Rewards: a `Rollout` in, one float per row out, NaN for a row that could not be scored.

Every reward is a callable `reward(rollout) -> (n,) float32` without gradient, with the `range` of its values;
`RewardSuite` is their weighted sum, `RewardModels` what they load.
"""

from fastcorl.answer_tags import extract_answer
from fastcorl.rewards.answers.rules import AccuracyReward, FormatReward
from fastcorl.rewards.captions.captioner import BlipCaptioner, PolicyCaptioner
from fastcorl.rewards.captions.scene_graph import TupleSimilarity, tuple_f1
from fastcorl.rewards.cycle import CaptionReward, cycle_reward
from fastcorl.rewards.images.groups import ImageSimilarity
from fastcorl.rewards.images.lpips import LPIPS
from fastcorl.rewards.images.perceptual import PerceptualReward, make_image_similarity, to_pixels
from fastcorl.rewards.images.vq import VQFeatures, lpips_distance
from fastcorl.rewards.models import RewardModels
from fastcorl.rewards.suite import RewardSuite, Scoring
from fastcorl.rewards.tim import Matcher, TIMReward, match_score
from fastcorl.rewards.users.rewards import RewardFailure

__all__ = [
    "LPIPS",
    "AccuracyReward",
    "BlipCaptioner",
    "CaptionReward",
    "FormatReward",
    "ImageSimilarity",
    "Matcher",
    "PerceptualReward",
    "PolicyCaptioner",
    "RewardFailure",
    "RewardModels",
    "RewardSuite",
    "Scoring",
    "TIMReward",
    "TupleSimilarity",
    "VQFeatures",
    "cycle_reward",
    "extract_answer",
    "lpips_distance",
    "make_image_similarity",
    "match_score",
    "to_pixels",
    "tuple_f1",
]
