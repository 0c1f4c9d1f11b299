"""Sampling drawings and answers from a policy."""

from fastcorl.rollout.engine import RolloutEngine
from fastcorl.rollout.sampling import SamplingParams, row_seed

__all__ = ["RolloutEngine", "SamplingParams", "row_seed"]
