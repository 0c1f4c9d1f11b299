"""Which prompts a step takes: a function of seed, stage and step alone, so that resuming needs no state."""

import hashlib
from functools import lru_cache

from fastcorl.errors import UserError


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, stage: str, epoch: int) -> list[int]:
    """Indices sorted by a hash, which no version of a library or of Python changes."""
    prefix = f"{seed}/{stage}/{epoch}/"
    return sorted(range(size), key=lambda index: hashlib.sha256(f"{prefix}{index}".encode()).digest())


class PromptSampler:
    """Seeded permutations of `size` prompts laid one after another, cut into steps; a step may span two of them."""

    def __init__(self, size: int, seed: int, prompts_per_step: int, stage: str = ""):
        if prompts_per_step > size:
            raise UserError(f"{self._key(stage)} {prompts_per_step} exceeds the {size} prompts there are")
        self.size = size
        self.seed = seed
        self.prompts_per_step = prompts_per_step
        self.stage = stage

    def indices(self, step: int) -> list[int]:
        """The prompts of `step`, counted from 1, over all ranks."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        start = (step - 1) * self.prompts_per_step
        places = (divmod(place, self.size) for place in range(start, start + self.prompts_per_step))
        return [_permutation(self.size, self.seed, self.stage, epoch)[offset] for epoch, offset in places]

    def for_rank(self, step: int, rank: int, world: int) -> list[int]:
        """The part of `indices(step)` that `rank` of `world` takes."""
        if self.prompts_per_step % world:
            raise UserError(f"{self._key(self.stage)} {self.prompts_per_step} does not divide by {world} ranks")
        return self.indices(step)[rank::world]

    @staticmethod
    def _key(stage: str) -> str:
        return f"stages.{stage}.prompts_per_step" if stage else "prompts_per_step"
