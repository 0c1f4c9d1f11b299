"""Win rates within groups, from a judge of pairs (the preference setting of MTPO, arXiv 2405.14655)."""

from collections.abc import Sequence
from itertools import combinations

import torch


def group_pairs(num_prompts: int, group_size: int) -> list[tuple[int, int]]:
    """All unordered pairs (i, j), i < j, of rows of the same group, group by group: P * G (G - 1) / 2 of them."""
    return [
        pair
        for start in range(0, num_prompts * group_size, group_size)
        for pair in combinations(range(start, start + group_size), 2)
    ]


def win_rates(probabilities: torch.Tensor, pairs: Sequence[tuple[int, int]], num_rows: int) -> torch.Tensor:
    """How often each row wins, (n,) float32 in [0, 1]: r_i = mean over its judged pairs of P(i beats j).

    Args: `probabilities` (len(pairs),) float32 in [0, 1], of the first row of a pair beating the second, NaN for a
    pair that was not judged; the second beats the first with the rest. A row without a judged pair is NaN.
    """
    if not pairs:
        return torch.full((num_rows,), torch.nan)
    rows = torch.tensor(pairs)
    judged = ~probabilities.isnan()
    rows, probabilities = rows[judged], probabilities[judged].double()
    wins, games = torch.zeros(2, num_rows, dtype=torch.float64)
    for side, won in ((0, probabilities), (1, 1 - probabilities)):
        wins.index_add_(0, rows[:, side], won)
        games.index_add_(0, rows[:, side], torch.ones_like(won))
    return (wins / games).float()
