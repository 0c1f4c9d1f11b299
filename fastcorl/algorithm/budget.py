"""A fixed number of answer tokens per step (C3PO of Ring-lite, arXiv 2506.14731): the loss is divided by the budget, so
that its scale does not vary with the lengths that happened to be sampled."""

import torch


def budget_lengths(lengths: torch.Tensor, budget: int, seed: int) -> torch.Tensor:
    """How many tokens of each answer to train on.

    Answers are taken in a random order until `budget` tokens are full; the last one is cut to fit, the rest get 0.
    Where all of them are shorter than the budget together, all are taken whole.

    Args: `lengths` (n,) int64. Returns: (n,) int64, at most `lengths`, with a sum of at most `budget`.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    shuffled = lengths.cpu()[order]
    room = (budget - (shuffled.cumsum(0) - shuffled)).clamp(min=0)
    taken = torch.zeros_like(shuffled)
    taken[order] = torch.minimum(shuffled, room)
    return taken.to(lengths.device)
