"""Attention of a pack by SDPA, sequences of similar length right-padded side by side: for any device and type.

With the padding on the right, plain causal attention never lets a real query see it; only sequences that see another
one need a mask. Padding exists only inside the call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcorl.model.pack_layout import PackLayout, Span


class Bucket(NamedTuple):
    """One SDPA call: (spans, longest) positions of the queries and of what they see, and the mask, None if causal."""

    own: torch.Tensor
    seen: torch.Tensor
    mask: torch.Tensor | None


def by_buckets(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scaling: float
) -> torch.Tensor:
    """See `Attend`."""
    buckets, places = layout.plan(make_buckets)
    outputs = []
    for own, seen, mask in buckets:
        q, k, v = _stand(query, own), _stand(key, seen), _stand(value, seen)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, places)


def make_buckets(layout: PackLayout) -> tuple[list[Bucket], torch.Tensor]:
    """The calls, and (N,) where each position stands among their padded places."""
    members: dict[tuple[int, int], list[tuple[Span, Span]]] = {}
    for own, before in zip(layout.sequences, layout.seen, strict=True):
        if own.length:
            members.setdefault((_bucket(own.length), _bucket(before.length)), []).append((own, before))
    buckets = []
    places = torch.empty(layout.size, dtype=torch.int64)
    offset = 0
    for spans in members.values():
        own, real = _grid([each for each, _ in spans])
        places[own[real]] = offset + torch.arange(own.numel()).view_as(own)[real]
        offset += own.numel()
        seen, mask = own, None
        if any(before.length for _, before in spans):
            before, known = _grid([each for _, each in spans])
            causal = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril()
            known = known[:, None].expand(-1, own.shape[1], -1)
            mask = torch.cat([known, causal.expand(len(own), -1, -1)], dim=-1)[:, None].to(layout.device)
            seen = torch.cat([before, own], dim=1)
        buckets.append(Bucket(own.to(layout.device), seen.to(layout.device), mask))
    return buckets, places.to(layout.device)


def _grid(spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
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
