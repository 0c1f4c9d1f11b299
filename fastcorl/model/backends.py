"""Which way packs are attended on a device: the configured one, or the first that works when it is tried there."""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import torch

from fastcorl.errors import UserError
from fastcorl.model import prefix_attention, varlen
from fastcorl.model.buckets import by_buckets
from fastcorl.model.flex import by_flex
from fastcorl.model.pack_layout import Attend, PackLayout, by_dense_mask
from fastcorl.model.prefix_attention import in_two_parts

# Where the variable-length kernels run.
DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)

AUTO, FLEX, SDPA = "auto", "flex", "sdpa"

NAMES = (AUTO, *varlen.KERNELS, FLEX, SDPA)

Ways = dict[str, Callable[[], Attend]]
# In the order of preference: for packs in which no sequence sees another one, and for the others.
OWN: Ways = {**varlen.KERNELS, FLEX: lambda: by_flex, SDPA: lambda: by_buckets}
SHARED: Ways = {
    **{name: lambda make=make: in_two_parts(make()) for name, make in prefix_attention.KERNELS.items()},
    FLEX: lambda: by_flex,
    SDPA: lambda: by_buckets,
}
# What a named backend takes for shared prefixes; the layout of xformers' logsumexp depends on which kernel it takes.
SHARED_OF = {
    "flash_attn": ("flash_attn", FLEX, SDPA),
    "xformers": ("torch", FLEX, SDPA),
    "torch": ("torch", FLEX, SDPA),
    FLEX: (FLEX,),
    SDPA: (SDPA,),
}

# What a way is tried on: several blocks of a kernel, a single position, and none at all; and a second size of pack, for
# which compiled ways are compiled again. Of each pack the lengths, the prefixes and how much of these is seen.
OWN_PACKS = (((3, 1, 0, 140),), ((200, 60),))
SHARED_PACKS = (
    ((141, 3, 1, 0, 33, 40, 2), (-1, 0, 0, 0, 0, -1, 5), (0, 141, 141, 141, 130, 0, 40)),
    ((1, 70, 200), (2, -1, 1), (200, 0, 70)),
)
HEADS, KV_HEADS = 4, 2
TOLERANCE = 0.02  # of the norm: rounding to bfloat16 is within 0.005, one wrong position beyond 0.04

PROBLEMS = (ImportError, RuntimeError, TypeError, ValueError, AttributeError)  # NotImplementedError is a RuntimeError

logger = logging.getLogger(__name__)


class PackedBackend(NamedTuple):
    """How to attend in packs in which no sequence sees another one (`own`), and in the others (`shared`)."""

    own: Attend
    shared: Attend


class _Choice(NamedTuple):
    name: str
    attend: Attend
    reasons: list[str]  # why those before it are not taken, a line each


def packed_backend(name: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> PackedBackend:
    """The backend `name` for this type, head dimension and device; what it is is logged once, in one line.

    `auto` takes the first way that imports, runs and agrees with SDPA on this device, forward and backward; away from
    CUDA and half precision that is SDPA. Raises UserError where the one that is named does not.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _packed_backend(name, dtype, head_dim, device)


@functools.cache
def _packed_backend(name: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> PackedBackend:
    kernels = device.type == DEVICE and dtype in DTYPES
    place = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    if name in varlen.KERNELS and not kernels:
        raise UserError(
            f"model.attention: {name} runs on CUDA in float16 or bfloat16, and this is {place}; take auto, "
            "or a GPU and model.dtype: bfloat16"
        )
    if name == AUTO:
        names = shared_names = tuple(OWN) if kernels else (SDPA,)
    else:
        names, shared_names = (name,), SHARED_OF[name]
    own = _first(OWN, names, dtype, head_dim, device, OWN_PACKS)
    shared = _first(SHARED, shared_names, dtype, head_dim, device, SHARED_PACKS)
    reasons = "; ".join(dict.fromkeys(own.reasons + shared.reasons))
    level = logging.WARNING if kernels and name != SDPA and SDPA in (own.name, shared.name) else logging.INFO
    chosen = own.name if own.name == shared.name else f"{own.name}, and {shared.name} where prefixes are shared"
    without = f" (without {reasons})" if reasons else ""
    logger.log(level, "packed attention in %s with head dimension %d: %s%s", place, head_dim, chosen, without)
    return PackedBackend(own.attend, shared.attend)


def _first(
    ways: Ways,
    names: Sequence[str],
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    packs: Sequence[tuple[Sequence[int], ...]],
) -> _Choice:
    """The first of `names` that works on the packs. Raises UserError when none does."""
    reasons = []
    for name in names:
        if name == SDPA:  # what the others are compared with
            return _Choice(name, ways[name](), reasons)
        if name not in ways:
            continue
        try:
            attend = ways[name]()
            # Autograd's modes belong to a thread: the caller may be in inference mode or inside a checkpointed layer.
            with ThreadPoolExecutor(1) as thread:
                errors = [thread.submit(_errors, attend, dtype, head_dim, device, *pack).result() for pack in packs]
        except PROBLEMS as problem:
            reasons.append(f"{name}: {type(problem).__name__}: {problem}".strip().splitlines()[0])
            continue
        error = torch.cat(errors).max().item()  # NaN if one is
        if error < TOLERANCE:
            return _Choice(name, attend, reasons)
        reasons.append(f"{name}: it is off by {error:.2g} of what SDPA gives")
    raise UserError(f"model.attention: cannot use {'; '.join(reasons)}; auto takes what works here")


def _errors(
    attend: Attend,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    lengths: Sequence[int],
    *prefixes: Sequence[int],
) -> torch.Tensor:
    """(4,) relative errors of the output and of the three gradients against SDPA in float32; some may be NaN."""
    layout = PackLayout(torch.tensor([0, *accumulate(lengths)], device=device), *map(torch.tensor, prefixes))
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = (
        torch.randn(layout.size, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    scaling = head_dim**-0.5 / 2  # not the default of any kernel

    def results(attend: Attend, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = attend(*leaves, layout, scaling)
        return out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))

    expected = results(by_dense_mask, *(states.float() for states in (query, key, value)))
    actual = results(attend, query, key, value)
    errors = [(one.float() - other).norm() / other.norm() for one, other in zip(actual, expected, strict=True)]
    return torch.stack(errors)
