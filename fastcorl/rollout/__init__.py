"""Sampling drawings and answers from a policy."""

from fastcorl.rollout.engine import RolloutEngine, SamplingParams
from fastcorl.rollout.sampling import gumbel_noise, row_seed, sample

__all__ = ["RolloutEngine", "SamplingParams", "gumbel_noise", "row_seed", "sample"]
