"""Joining the weights of refined policies around the start they share."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

METHODS = ("gaussian", "linear", "ties")


@torch.no_grad()
def gaussian_merge(
    base: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, width: float = 2.0
) -> torch.Tensor:
    """Gaussian-distribution weight merge of two fine-tuned tensors around their common start (Si et al. 2501.10661).

    Per tensor, each model's update is split by a Gaussian estimate: entries within `width` standard deviations (of the
    narrower update) of the mean of both updates are common and count half, so that both models together average;
    entries further out are what that model learnt for its own task and count whole.

    Args: tensors of one shape, any float type. Returns: the merged tensor in the type of `base`.
    """
    start = base.double()
    updates = (first.double() - start, second.double() - start)
    if base.numel() < 2:
        return (start + sum(updates) / 2).to(base.dtype)
    centre = (updates[0].mean() + updates[1].mean()) / 2
    reach = width * torch.minimum(updates[0].std(), updates[1].std())
    merged = sum(torch.where((update - centre).abs() < reach, update / 2, update) for update in updates)
    return (start + merged).to(base.dtype)


@torch.no_grad()
def linear_merge(base: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    """The mean of fine-tuned tensors, in the type of `base`."""
    return (sum(tensor.double() for tensor in tuned) / len(tuned)).to(base.dtype)


@torch.no_grad()
def ties_merge(base: torch.Tensor, *tuned: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    """TIES merge (Yadav et al. 2023, arXiv 2306.01708, algorithm 1, scale 1) of fine-tuned tensors around `base`.

    Each update keeps its `density` largest entries, by magnitude in this tensor; every entry takes the sign that has
    more mass over the updates, and the mean of the kept ones of that sign.
    """
    start = base.double()
    kept = [_largest(tensor.double() - start, density) for tensor in tuned]
    sign = torch.sign(sum(kept))
    agreeing = [torch.where(torch.sign(update) == sign, update, 0.0) for update in kept]
    count = sum((update != 0).double() for update in agreeing)
    return (start + sum(agreeing) / count.clamp(min=1)).to(base.dtype)


def merge_state_dicts(
    base: dict[str, torch.Tensor],
    *tuned: dict[str, torch.Tensor],
    method: str = "gaussian",
    density: float = 0.2,
) -> dict[str, torch.Tensor]:
    """Merge every floating tensor; all dictionaries must have the same keys and shapes.

    Args: `method` one of METHODS, gaussian of exactly two; `density` of ties. Raises ValueError.
    """
    merge = _method(method, tuned, density)
    for other in tuned:
        odd = sorted(base.keys() ^ other.keys()) or [name for name in base if base[name].shape != other[name].shape]
        if odd:
            raise ValueError(f"the weights to merge do not have the same tensors; first that differs: {odd[0]}")
    return {
        name: merge(tensor, *(other[name] for other in tuned)) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def _method(method: str, tuned: Sequence[dict], density: float) -> Callable[..., torch.Tensor]:
    if method == "gaussian" and len(tuned) != 2:
        raise ValueError(f"a Gaussian merge takes two models, got {len(tuned)}")
    if method == "ties":
        return partial(ties_merge, density=density)
    return {"gaussian": gaussian_merge, "linear": linear_merge}[method]


def _largest(update: torch.Tensor, density: float) -> torch.Tensor:
    """`update` with all but its `density` largest entries set to 0."""
    count = max(1, round(density * update.numel()))
    magnitudes = update.abs().flatten()
    threshold = magnitudes.kthvalue(magnitudes.numel() - count + 1).values if magnitudes.numel() else 0
    return torch.where(update.abs() >= threshold, update, 0.0)
