"""Attention of the language backbone, plugged in through transformers' attention-function registry.

The backbone is called with `attention=<context>`; the context decides how queries meet keys: `PackedAttention` for
packed sequences, in training, scoring and prefill. Decoding has its own way through the same weights (`rollout/`).
"""

from typing import Protocol

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastcorl.model.backends import packed_backend
from fastcorl.model.pack_layout import PackLayout

IMPLEMENTATION = "fastcorl"


class AttentionContext(Protocol):
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """(B, heads, L, D) query, (B, kv_heads, L, D) key and value -> (B, L, heads, D)."""
        ...


def fastcorl_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    attention: AttentionContext,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The registered function; transformers calls it once per layer."""
    return attention.attend(module.layer_idx, query, key, value, scaling), None


def register() -> None:
    """Make `attn_implementation="fastcorl"` known. No mask function goes with it, so transformers builds no mask."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, fastcorl_attention)


class PackedAttention:
    """Causal attention inside each sequence of a pack of N positions and, where one continues another, to that one.

    Args:
        cu_seqlens, prefixes, prefix_lengths, device: see `PackLayout`.
        keep_kv: store each layer's keys and values, (N, kv_heads, D), for a decoder to start from.
        backend: what computes it, of `backends.NAMES`.

    It is differentiable in queries, keys and values.
    """

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        prefixes: torch.Tensor | None = None,
        *,
        prefix_lengths: torch.Tensor | None = None,
        device: torch.device | None = None,
        keep_kv: bool = False,
        backend: str = "auto",
    ):
        self.layout = PackLayout(cu_seqlens, prefixes, prefix_lengths, device)
        self.backend = backend
        self.keys: list[torch.Tensor] | None = [] if keep_kv else None
        self.values: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        packed = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        return self.attend_packed(*packed, scaling).unsqueeze(0)

    def attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """(N, heads, D) query, (N, kv_heads, D) key and value of one layer -> (N, heads, D)."""
        if self.keys is not None:
            # Copies: what they are views of would be kept with them.
            self.keys.append(key.clone(memory_format=torch.contiguous_format))
            self.values.append(value.clone(memory_format=torch.contiguous_format))
        backend = packed_backend(self.backend, query.dtype, query.shape[-1], query.device)
        attend = backend.shared if self.layout.shares else backend.own
        return attend(query, key, value, self.layout, scaling)
