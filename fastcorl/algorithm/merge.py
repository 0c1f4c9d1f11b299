"""Joining the weights of two refined policies."""

import torch


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


def merge_state_dicts(
    base: dict[str, torch.Tensor], first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Merge every floating tensor; the three dictionaries must have the same keys and shapes."""
    if not base.keys() == first.keys() == second.keys():
        odd = sorted(base.keys() ^ first.keys() | base.keys() ^ second.keys())
        raise ValueError(f"the weights to merge do not have the same tensors; first that differs: {odd[0]}")
    return {
        name: gaussian_merge(tensor, first[name], second[name]) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }
