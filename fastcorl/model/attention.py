"""Attention of the language backbone, plugged in through transformers' attention-function registry.

The backbone is called with `attention=<context>`; the context decides how queries meet keys: `PackedAttention` for
packed sequences, in training, scoring and prefill. Decoding has its own way through the same weights (`rollout/`).
"""

from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastcorl.model.varlen import varlen_for

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
    """Causal attention inside each sequence of a pack of N positions.

    Args:
        cu_seqlens: (S + 1,) int; sequence `s` takes the positions `cu_seqlens[s]:cu_seqlens[s + 1]`.
        prefixes: (S,) int64; a sequence with `prefixes[s] = p >= 0` continues sequence `p`: its positions attend to all
            of `p` and causally to themselves. -1 marks a sequence on its own, as does None for all.
        prefix_lengths: (S,) int64; how many positions of the sequence that it continues each one sees; None sees all.
        keep_kv: store each layer's keys and values, (N, kv_heads, D), for a decoder to start from.

    It is differentiable in queries, keys and values, on either of two ways:

    - On CUDA in half precision, a pack in which no sequence continues another goes to a variable-length kernel, as it
      lies (`varlen.py`).
    - Otherwise sequences of similar length are stood side by side, right-padded, for one SDPA call per bucket: with the
      padding on the right, plain causal attention never lets a real query see it. Padding exists only inside this call.
    """

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        prefixes: torch.Tensor | None = None,
        *,
        prefix_lengths: torch.Tensor | None = None,
        keep_kv: bool = False,
    ):
        self.keys: list[torch.Tensor] | None = [] if keep_kv else None
        self.values: list[torch.Tensor] = []
        self.cu_seqlens = cu_seqlens.int()
        self.bounds: list[int] = cu_seqlens.tolist()
        self.parents = [-1] * (len(self.bounds) - 1) if prefixes is None else prefixes.tolist()
        self.limits = None if prefix_lengths is None else prefix_lengths.tolist()
        # An upper bound is enough; at 1 the kernels take their path for decoding, which is not the one that was tried.
        self.longest = max(2, *(end - start for start, end in pairwise(self.bounds)))

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
        varlen = varlen_for(query) if max(self.parents) < 0 else None
        if varlen is not None:
            return varlen(query, key, value, self.cu_seqlens, self.longest, scaling)
        calls, places = self.buckets
        outputs = []
        for own, seen, mask in calls:
            q, k, v = _stand(query, own), _stand(key, seen), _stand(value, seen)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, places)

    @cached_property
    def buckets(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], torch.Tensor]:
        """For each SDPA call the positions of the queries and of what they see, padded, and the mask, None if causal;
        and (N,) where each position stands among the padded places."""
        device = self.cu_seqlens.device
        # Per bucket of similar lengths: the spans of its sequences and of what they continue.
        buckets: dict[tuple[int, int], list[tuple[tuple[int, int], tuple[int, int]]]] = {}
        for sequence, (own_span, parent) in enumerate(zip(pairwise(self.bounds), self.parents, strict=True)):
            before_span = (self.bounds[parent], self.bounds[parent + 1]) if parent >= 0 else (0, 0)
            if self.limits is not None and parent >= 0:
                before_span = before_span[0], before_span[0] + self.limits[sequence]
            key = _bucket(own_span[1] - own_span[0]), _bucket(before_span[1] - before_span[0])
            if own_span[1] > own_span[0]:
                buckets.setdefault(key, []).append((own_span, before_span))
        calls = []
        places = torch.empty(self.bounds[-1], dtype=torch.int64)
        offset = 0
        for (_, parent_bucket), members in buckets.items():
            own, real = _grid([own_span for own_span, _ in members])
            places[own[real]] = offset + torch.arange(own.numel()).view_as(own)[real]
            offset += own.numel()
            seen, mask = own, None
            if parent_bucket >= 0:
                before, known = _grid([before_span for _, before_span in members])
                causal = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril()
                mask = torch.cat(
                    [known[:, None].expand(-1, own.shape[1], -1), causal.expand(len(own), -1, -1)], dim=-1
                )[:, None].to(device)
                seen = torch.cat([before, own], dim=1)
            calls.append((own.to(device), seen.to(device), mask))
        return calls, places.to(device)


def _grid(spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of spans side by side, (spans, longest), padded with each span's last; and which of them are real."""
    starts, ends = torch.tensor(spans).T
    grid = starts[:, None] + torch.arange(int((ends - starts).max()))
    return grid.minimum(ends[:, None] - 1), grid < ends[:, None]


def _stand(states: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """(N, heads, D) states at (spans, longest) positions -> (spans, heads, longest, D).

    `index_select`, because its backward adds rows in one pass where that of an index expression sorts first.
    """
    return states.index_select(0, grid.flatten()).unflatten(0, grid.shape).transpose(1, 2)


def _bucket(length: int) -> int:
    """Lengths within about a fifth of one another share a bucket; 0 has its own."""
    if length == 0:
        return -1
    return round(4 * (length - 1).bit_length() + 4 * (length / (1 << (length - 1).bit_length())))
