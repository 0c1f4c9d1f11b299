"""Plain torch group advantages."""

import torch


def group_advantages_reference(rewards, group_size, weights, mode, scale, eps):
    """See ``group_advantages``; rewards (n,) or (n, k), weights (k,) float64, or None for ones."""
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    # float64: the tensors are tiny, and float32 sums of weighted columns would make equal rewards differ.
    columns = rewards.detach().double()
    columns = columns[:, None] if columns.dim() == 1 else columns
    if mode == "sum_then_normalize":
        # A column of weight 0 is left out, not multiplied by 0: its NaN must not reach the others.
        weighted = columns if weights is None else torch.where(weights == 0, 0.0, columns * weights)
        return normalize_groups(weighted.sum(dim=1), group_size, scale, eps).to(dtype)
    weights = columns.new_ones(columns.shape[1]) if weights is None else weights
    normalized = torch.stack([normalize_groups(c, group_size, scale, eps) for c in columns.unbind(1)], dim=1)
    advantages = (normalized * weights).sum(dim=1)
    if scale == "std":
        # GDPO's batch normalisation. Every group is centred already, so the batch mean is 0 by construction;
        # subtracting its rounding error would only make constant groups differ from 0.
        counted = torch.where(weights == 0, False, columns.isfinite()).any(dim=1)
        squares = torch.where(counted, advantages, 0.0).square().sum()
        advantages = advantages / ((squares / (counted.sum() - 1).clamp(min=1)).sqrt() + eps)
    return advantages.to(dtype)


def normalize_groups(rewards, group_size, scale, eps):
    """(n,) rewards to (n,) advantages; two passes, so that a mean far above the spread costs no digits."""
    groups = rewards.view(-1, group_size)
    counted = groups.isfinite()
    count = counted.sum(dim=1, keepdim=True)
    # Distances from a member are exactly 0 where all are equal; the mean of equal numbers is not always that number.
    highest = torch.where(counted, groups, -torch.inf).amax(dim=1, keepdim=True)
    distance = torch.where(counted, groups - highest, 0.0)
    centered = torch.where(counted, distance - distance.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    if scale == "std":
        variance = centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centered = torch.where(centered == 0, 0.0, centered / (variance.sqrt() + eps))
    return centered.reshape(-1)
