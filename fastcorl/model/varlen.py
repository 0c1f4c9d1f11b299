"""Variable-length kernels for packs in which no sequence sees another one, on CUDA in half precision.

A kernel reads the pack as it lies, so nothing is padded. Each loader imports its package and gives the way to attend.
"""

import functools
import inspect
from collections.abc import Callable

import torch

from fastcorl.model.pack_layout import Attend, PackLayout


def _flash_attn() -> Attend:
    from flash_attn import flash_attn_varlen_func

    def attend(query, key, value, layout, scaling):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.longest,
            layout.longest,
            softmax_scale=scaling,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # as torch's own kernels do
        )

    return attend


def _xformers() -> Attend:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    def mask_of(layout: PackLayout):
        lengths = [span.length for span in layout.sequences if span.length]
        return BlockDiagonalCausalMask.from_seqlens(lengths, device=layout.device)

    def attend(query, key, value, layout, scaling):
        query, key, value = (states[None] for states in (query, *repeated(query, key, value)))
        return memory_efficient_attention(query, key, value, attn_bias=layout.plan(mask_of), scale=scaling)[0]

    return attend


def _torch() -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12
    if grouped:
        varlen_attn = functools.partial(varlen_attn, enable_gqa=True)

    def attend(query, key, value, layout, scaling):
        if not grouped:
            key, value = repeated(query, key, value)
        bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest)
        return varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0))  # (-1, 0) is causal

    return attend


def repeated(query: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(N, kv_heads, D) states, each head as often as queries of (M, heads, D) share it -> (N, heads, D)."""
    groups = query.shape[1] // states[0].shape[1]
    return tuple(each.repeat_interleave(groups, dim=1) for each in states) if groups > 1 else states


# In the order of preference.
KERNELS: dict[str, Callable[[], Attend]] = {"flash_attn": _flash_attn, "xformers": _xformers, "torch": _torch}
