"""Triton group advantages: one launch, two passes over each group, float64 inside as in the reference."""

import torch
import triton
import triton.language as tl


@triton.jit
def normalize(rewards, inside, eps, SCALE: tl.constexpr):
    """(GROUP, COLUMNS) float64 rewards to advantages per column, and which entries counted."""
    counted = inside & (rewards == rewards) & (tl.abs(rewards) != float("inf"))
    count = tl.sum(counted.to(tl.float64), 0)
    # Distances from a member are exactly 0 where all are equal; the mean of equal numbers is not always that number.
    highest = tl.max(tl.where(counted, rewards, float("-inf")), 0)
    distance = tl.where(counted, rewards - highest[None, :], 0.0)
    mean = tl.sum(distance, 0) / tl.maximum(count, 1.0)
    centered = tl.where(counted, distance - mean[None, :], 0.0)
    if SCALE:
        variance = tl.sum(centered * centered, 0) / tl.maximum(count - 1.0, 1.0)
        deviation = tl.sqrt(variance) + eps
        centered = tl.where(centered == 0.0, 0.0, centered / deviation[None, :])
    return centered, counted


@triton.jit
def load_group(rewards, group, row_stride, column_stride, group_size, columns, GROUP: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, GROUP), tl.arange(0, K)
    inside = (i < group_size)[:, None] & (k < columns)[None, :]
    rows = group.to(tl.int64) * group_size + i
    places = rows[:, None] * row_stride + k[None, :].to(tl.int64) * column_stride
    return tl.load(rewards + places, mask=inside, other=0.0).to(tl.float64), inside, rows


@triton.jit
def sum_then_normalize_kernel(
    rewards,
    weights,
    out,
    row_stride,
    column_stride,
    group_size,
    columns,
    eps,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
):
    values, inside, rows = load_group(
        rewards, tl.program_id(0), row_stride, column_stride, group_size, columns, GROUP, K
    )
    k = tl.arange(0, K)
    weight = tl.load(weights + k, mask=k < columns, other=0.0)
    # A column of weight 0 is left out, not multiplied by 0.
    total = tl.sum(tl.where((weight == 0.0)[None, :], 0.0, values * weight[None, :]), 1)
    member = tl.arange(0, GROUP) < group_size
    centered, _ = normalize(total[:, None], member[:, None], eps, SCALE)
    tl.store(out + rows, tl.sum(centered, 1).to(out.dtype.element_ty), mask=member)


@triton.jit
def normalize_then_sum_kernel(
    rewards,
    weights,
    sums,
    out,
    row_stride,
    column_stride,
    group_size,
    columns,
    groups,
    eps,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
):
    """One program, since the last step divides by the deviation over all groups."""
    k = tl.arange(0, K)
    member = tl.arange(0, GROUP) < group_size
    weight = tl.load(weights + k, mask=k < columns, other=0.0)
    squares = tl.zeros((GROUP,), tl.float64)
    number = tl.zeros((GROUP,), tl.float64)
    for group in range(groups):
        values, inside, rows = load_group(
            rewards, tl.cast(group, tl.int32), row_stride, column_stride, group_size, columns, GROUP, K
        )
        centered, counted = normalize(values, inside, eps, SCALE)
        total = tl.sum(centered * weight[None, :], 1)
        counts = tl.max((counted & (weight != 0.0)[None, :]).to(tl.int32), 1) > 0
        squares += tl.where(counts, total * total, 0.0)
        number += counts.to(tl.float64)
        tl.store(sums + rows, total, mask=member)
    divisor = tl.sqrt(tl.sum(squares, 0) / tl.maximum(tl.sum(number, 0) - 1.0, 1.0)) + eps
    tl.debug_barrier()
    for group in range(groups):
        rows = tl.cast(group, tl.int64) * group_size + tl.arange(0, GROUP)
        total = tl.load(sums + rows, mask=member, other=0.0)
        if SCALE:
            total = tl.where(total == 0.0, 0.0, total / divisor)
        tl.store(out + rows, total.to(out.dtype.element_ty), mask=member)


def group_advantages_triton(rewards, group_size, weights, mode, scale, eps):
    """See ``group_advantages``; rewards (n,) or (n, k), weights (k,) float64, or None for ones."""
    rewards = rewards.detach()
    rewards = rewards[:, None] if rewards.dim() == 1 else rewards
    count, columns = rewards.shape
    if weights is None:
        weights = torch.ones(columns, dtype=torch.float64, device=rewards.device)
    out = torch.empty(count, dtype=torch.float32, device=rewards.device)
    if count == 0:
        return out
    sizes = {"SCALE": scale == "std", "GROUP": triton.next_power_of_2(group_size), "K": triton.next_power_of_2(columns)}
    shape = (*rewards.stride(), group_size, columns)
    groups = count // group_size
    if mode == "sum_then_normalize":
        sum_then_normalize_kernel[(groups,)](rewards, weights, out, *shape, eps, **sizes)
    else:
        sums = torch.empty(count, dtype=torch.float64, device=rewards.device)
        normalize_then_sum_kernel[(1,)](rewards, weights, sums, out, *shape, groups, eps, **sizes)
    return out
