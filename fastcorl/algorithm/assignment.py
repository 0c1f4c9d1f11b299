"""Which sequences share a micro-batch, and which rank trains on them: by the positions they take."""

from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from fastcorl.errors import UserError

# Sequences move to another rank where that takes at least this part off the longest rank's positions.
WORTHWHILE = 0.03


class Cost(NamedTuple):
    """Positions that a sequence takes in a micro-batch: `own`, and once per micro-batch those of its `prefix`."""

    prefix: Hashable
    prefix_tokens: int
    own: int


def assign(costs: Sequence[Cost], capacity: int, min_runs: int = 1) -> list[slice]:
    """Cuts a line of sequences into runs of at most `capacity` positions: as few as that allows, but at least
    `min_runs`, and the largest of them as small as that number allows.

    Raises:
        UserError: a sequence is longer than `capacity`, or there are fewer sequences than `min_runs`.
    """
    longest = max((cost.prefix_tokens + cost.own for cost in costs), default=0)
    if longest > capacity:
        raise UserError(f"packing.tokens is {capacity}, but one sequence has {longest} tokens; raise it")
    if min_runs > len(costs):
        raise UserError(
            f"{min_runs} micro-batches for {len(costs)} sequences: "
            "raise packing.tokens, prompts_per_step or algorithm.token_budget"
        )
    count = max(min_runs, len(_cut(costs, capacity)))
    # A higher limit never needs more runs, so the lowest that is enough is found by halving.
    low, high = longest, capacity
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(costs, middle)) <= count else (middle + 1, high)
    runs = _cut(costs, low)
    while len(runs) < count:
        index, run = max(enumerate(runs), key=lambda each: each[1].stop - each[1].start)
        middle = (run.start + run.stop) // 2
        runs[index : index + 1] = [slice(run.start, middle), slice(middle, run.stop)]
    return runs


def balance(costs: Sequence[Sequence[Cost]], capacity: int) -> list[list[slice]]:
    """The micro-batches of each rank, equally many, as runs of the line of all sequences, rank after rank.

    All stay where they are if that is nearly as good; otherwise the whole line is cut into runs of nearly equal size,
    so that those near the border to a neighbour move to it. Raises what `assign` raises.
    """
    line = [cost._replace(prefix=(rank, cost.prefix)) for rank, own in enumerate(costs) for cost in own]
    per_rank = -(-len(_cut(line, capacity)) // len(costs))
    runs = assign(line, capacity, per_rank * len(costs))
    moving = [runs[start : start + per_rank] for start in range(0, len(runs), per_rank)]
    staying = _staying(costs, capacity)
    if staying and _largest_load(line, moving) > (1 - WORTHWHILE) * _largest_load(line, staying):
        return staying
    return moving


def _staying(costs: Sequence[Sequence[Cost]], capacity: int) -> list[list[slice]] | None:
    """Every rank's own sequences; None where one has too few for the number of micro-batches that another needs."""
    count = max(len(_cut(own, capacity)) for own in costs)
    if min(map(len, costs)) < count:
        return None
    offsets = accumulate(map(len, costs), initial=0)
    return [
        [slice(offset + run.start, offset + run.stop) for run in assign(own, capacity, count)]
        for own, offset in zip(costs, offsets, strict=False)
    ]


def _largest_load(line: Sequence[Cost], shares: list[list[slice]]) -> int:
    return max(sum(load(line[run]) for run in share) for share in shares)


def load(costs: Sequence[Cost]) -> int:
    """Positions of a micro-batch of these sequences."""
    prefixes = {cost.prefix: cost.prefix_tokens for cost in costs}
    return sum(prefixes.values()) + sum(cost.own for cost in costs)


def _cut(costs: Sequence[Cost], limit: int) -> list[slice]:
    """Runs of at most `limit` positions, each as long as possible."""
    starts, total, present = [0], 0, set()
    for index, (prefix, prefix_tokens, own) in enumerate(costs):
        added = own if prefix in present else prefix_tokens + own
        if total + added > limit:
            starts.append(index)
            total, present, added = 0, set(), prefix_tokens + own
        total += added
        present.add(prefix)
    return [slice(start, stop) for start, stop in pairwise([*starts, len(costs)])]
