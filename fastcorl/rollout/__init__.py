"""Sampling drawings and answers from a policy."""

from fastcorl.rollout.engine import RolloutEngine
from fastcorl.rollout.groups import interleave, join_groups, take_groups
from fastcorl.rollout.sampling import SamplingParams, row_seed

__all__ = ["RolloutEngine", "SamplingParams", "interleave", "join_groups", "row_seed", "take_groups"]
