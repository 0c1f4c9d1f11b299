"""Rewards of different ranges on one scale."""

from typing import Protocol

import torch

from fastcorl.records import Rollout


class Reward(Protocol):
    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest reward."""
        ...

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """(n,) float32 without gradient, NaN for a row that could not be scored."""
        ...


class Scaled:
    """A reward with its range mapped to [0, 1]."""

    range = (0.0, 1.0)

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return to_unit(self.reward(rollout), self.reward.range)


def to_unit(values: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """`value_range` mapped to [0, 1]; what lies outside of it is taken for its end."""
    low, high = value_range
    return ((values - low) / (high - low)).clamp(0, 1)
