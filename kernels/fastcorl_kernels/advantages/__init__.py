"""Group-relative advantages."""

import torch

from fastcorl_kernels.advantages.reference import group_advantages_reference
from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import check_choice, check_number, is_integer, require

MODES = ("sum_then_normalize", "normalize_then_sum")
SCALES = ("std", "none")


def group_advantages(
    rewards, group_size, *, weights=None, mode="sum_then_normalize", scale="std", eps=1e-4, backend=None
):
    """Rewards minus their group's mean, over their group's standard deviation (GRPO, arXiv:2402.03300).

    Args:
        rewards: (n,) or (n, k) tensor, k reward functions; rows of a group lie side by side. Any real dtype.
        group_size: samples per prompt; divides n.
        weights: (k,) tensor or sequence, one weight per column; ones by default.
        mode: ``"sum_then_normalize"`` adds the weighted columns, then normalises within groups.
            ``"normalize_then_sum"`` is GDPO (arXiv:2601.05242): each column is normalised within groups, the weighted
            columns are added, and the sum is divided by its standard deviation over the whole batch.
        scale: ``"std"`` divides by the unbiased standard deviation plus ``eps``; ``"none"`` only subtracts the mean
            (Dr. GRPO, arXiv:2503.20783).
        eps: added to the standard deviation.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA.

    Returns:
        (n,) float32 (float64 for float64 rewards), without gradient. A group whose rewards are all equal gives exactly
        0, and so does a group of one. A NaN or infinite reward is left out of its group and gets 0.

    Raises:
        ValueError: naming the argument that does not fit.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    fits = isinstance(rewards, torch.Tensor) and rewards.dim() in (1, 2) and not rewards.is_complex()
    require(fits, "rewards", "a real tensor of shape (n,) or (n, k)", rewards)
    require(is_integer(group_size, 1), "group_size", "an integer of at least 1", group_size)
    require(rewards.shape[0] % group_size == 0, "rewards", f"a multiple of group_size={group_size} rows", rewards)
    check_choice(mode, "mode", MODES)
    check_choice(scale, "scale", SCALES)
    check_number(eps, "eps")
    columns = 1 if rewards.dim() == 1 else rewards.shape[1]
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float64, device=rewards.device)
        require(tuple(weights.shape) == (columns,), "weights", f"shape ({columns},), one per reward column", weights)
    if resolve_backend(backend, rewards) == "triton":
        from fastcorl_kernels.advantages.triton_kernels import group_advantages_triton

        with torch.cuda.device_of(rewards):
            return group_advantages_triton(rewards, group_size, weights, mode, scale, eps)
    return group_advantages_reference(rewards, group_size, weights, mode, scale, eps)
