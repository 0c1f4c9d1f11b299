"""Variable-length attention kernels for packs on CUDA in half precision, chosen by trying them on the device.

A kernel reads the pack as it lies, so nothing is padded, and is differentiable in query, key and value.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)

# What a candidate is tried on: several blocks of a kernel, a single position, and none at all.
LENGTHS = (3, 1, 0, 140)
HEADS, KV_HEADS = 4, 2
TOLERANCE = 0.02  # of the norm: rounding to bfloat16 is within 0.005, one wrong position beyond 0.04

logger = logging.getLogger(__name__)


class VarlenFunction(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scaling: float,
    ) -> torch.Tensor:
        """Causal attention inside each sequence, differentiable in query, key and value.

        (N, heads, D) query, (N, kv_heads, D) key and value, (S + 1,) int32 bounds of the sequences, of which none has
        more than `longest` positions -> (N, heads, D).
        """
        ...


def varlen_for(query: torch.Tensor) -> VarlenFunction | None:
    """What to run (N, heads, D) queries with; None on other devices, in other types, and where no kernel works."""
    if query.device.type != DEVICE or query.dtype not in DTYPES:
        return None
    return varlen_function(query.dtype, query.shape[-1], query.device.index)


@functools.cache
def varlen_function(dtype: torch.dtype, head_dim: int, device_index: int | None) -> VarlenFunction | None:
    """The first candidate that imports, runs and agrees with SDPA on this device, forward and backward; else None."""
    # Autograd's modes belong to a thread: the caller may be in inference mode or inside a checkpointed layer.
    with ThreadPoolExecutor(1) as thread:
        chosen, reasons = thread.submit(_choose, dtype, head_dim, torch.device(DEVICE, device_index)).result()
    level = logging.INFO if chosen else logging.WARNING
    for reason in reasons:
        logger.log(level, "packed attention does without %s", reason)
    outcome = chosen or "padded buckets of SDPA"
    logger.log(level, "packed attention in %s with head dimension %d runs on %s", dtype, head_dim, outcome)
    return CANDIDATES[chosen]() if chosen else None


def _choose(dtype: torch.dtype, head_dim: int, device: torch.device) -> tuple[str | None, list[str]]:
    """Name of the candidate to take, and why those before it are not taken, a line each."""
    reasons = []
    for name, load in CANDIDATES.items():
        try:
            error = _error(load(), dtype, head_dim, device)
        except (ImportError, RuntimeError, TypeError) as problem:  # NotImplementedError is a RuntimeError
            reasons.append(f"{name}: {type(problem).__name__}: {problem}".splitlines()[0])
            continue
        if error < TOLERANCE:
            return name, reasons
        reasons.append(f"{name}: it is off by {error:.2g} of what SDPA gives")
    return None, reasons


def _error(function: VarlenFunction, dtype: torch.dtype, head_dim: int, device: torch.device) -> float:
    """Largest relative error of the output and of the three gradients against SDPA in float32; may be NaN."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = (
        torch.randn(sum(LENGTHS), heads, head_dim, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    cu_seqlens = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    scaling = head_dim**-0.5 / 2  # not the default of any kernel

    def results(function: VarlenFunction, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*leaves, cu_seqlens, max(LENGTHS), scaling)
        return out, *torch.autograd.grad(out, leaves, weight.to(out.dtype))

    expected = results(one_by_one, *(states.float() for states in (query, key, value)))
    actual = results(function, query, key, value)
    errors = [(one.float() - other).norm() / other.norm() for one, other in zip(actual, expected, strict=True)]
    return torch.stack(errors).max().item()


def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float,
) -> torch.Tensor:
    """The reference: a `VarlenFunction` that calls SDPA for each sequence."""
    outputs = []
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            q, k, v = (states[None, start:end].transpose(1, 2) for states in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            outputs.append(out.transpose(1, 2).squeeze(0))
    return torch.cat(outputs)


def _flash_attn() -> VarlenFunction:
    from flash_attn import flash_attn_varlen_func

    def attend(query, key, value, cu_seqlens, longest, scaling):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            softmax_scale=scaling,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # as torch's own kernels do
        )

    return attend


def _torch() -> VarlenFunction:
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12
    if grouped:
        varlen_attn = functools.partial(varlen_attn, enable_gqa=True)

    def attend(query, key, value, cu_seqlens, longest, scaling):
        if not grouped:
            groups = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        return varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0))  # (-1, 0) is causal

    return attend


# In the order of preference.
CANDIDATES: dict[str, Callable[[], VarlenFunction]] = {
    "flash_attn": _flash_attn,
    "torch.nn.attention.varlen": _torch,
}
