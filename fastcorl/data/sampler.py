"""Which prompts a step takes: a function of seed, stage and step alone, so that resuming needs no state."""

import hashlib
from functools import lru_cache

from fastcorl.errors import UserError
from fastcorl.tasks import check_world, setting


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, stage: str, epoch: int) -> list[int]:
    """Indices sorted by a hash, which no version of a library or of Python changes."""
    prefix = f"{seed}/{stage}/{epoch}/"
    return sorted(range(size), key=lambda index: hashlib.sha256(f"{prefix}{index}".encode()).digest())


class PromptSampler:
    """Seeded permutations of `size` prompts laid one after another, cut into steps; a step may span two of them.

    A reserve, laid out in the same way from other permutations, gives a step further prompts.
    """

    def __init__(self, size: int, seed: int, prompts_per_step: int, stage: str = ""):
        if prompts_per_step > size:
            raise UserError(f"{setting(stage)} {prompts_per_step} exceeds the {size} prompts there are; lower it")
        self.size = size
        self.seed = seed
        self.prompts_per_step = prompts_per_step
        self.stage = stage

    def indices(self, step: int) -> list[int]:
        """The prompts of `step`, counted from 1, over all ranks."""
        start = first_place(step, self.prompts_per_step)
        return [self._at(start + place, self.stage) for place in range(self.prompts_per_step)]

    def for_rank(self, step: int, rank: int, world: int) -> list[int]:
        """The part of `indices(step)` that `rank` of `world` takes."""
        check_world(self.stage, self.prompts_per_step, world)
        return self.indices(step)[rank::world]

    def reserve(self, step: int, block: int) -> list[int]:
        """The prompts of a block (0, 1, ..) of the step's reserve.

        Blocks of a step neither overlap nor hold what the step itself takes, until there is nothing else left.
        """
        others = _others(self, step)
        start = block * self.prompts_per_step
        return [others[(start + place) % len(others)] for place in range(self.prompts_per_step)]

    def _at(self, place: int, stage: str) -> int:
        epoch, offset = divmod(place, self.size)
        return permutation(self.size, self.seed, stage, epoch)[offset]


@lru_cache(maxsize=4)
def _others(sampler: PromptSampler, step: int) -> list[int]:
    """One round of the reserve from where the step's own begins, without what the step takes."""
    own = set(sampler.indices(step))
    start = first_place(step, sampler.prompts_per_step)
    everything = [sampler._at(start + place, reserve_stage(sampler.stage)) for place in range(sampler.size)]
    distinct = list(dict.fromkeys(everything))  # a round that spans two permutations has some twice
    return [index for index in distinct if index not in own] or distinct


def first_place(step: int, prompts_per_step: int) -> int:
    """How many prompts the steps before `step` take."""
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    return (step - 1) * prompts_per_step


def reserve_stage(stage: str) -> str:
    """What the reserve's order is seeded with; no stage can have this name."""
    return f"{stage}/reserve"


def reserve_block(round: int, attempt: int) -> int:
    """The block of the reserve for `attempt` 0 of round 1, 2, .., or for a further attempt in place of a bad row.

    Round 0 is the step itself, whose attempt 0 is block -1. Cantor's pairing, so that no two share a block.
    """
    return (round + attempt) * (round + attempt + 1) // 2 + attempt - 1
