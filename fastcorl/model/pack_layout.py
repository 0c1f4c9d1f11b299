"""Where the sequences of a pack stand and what each of them sees: what every way to attend is given."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F

Plan = TypeVar("Plan")


class Span(NamedTuple):
    """Positions [start, end) of a pack."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class PackLayout:
    """A pack of N positions, of which each sequence sees itself causally and, maybe, a part of another one.

    Args:
        cu_seqlens: (S + 1,) int; sequence `s` takes the positions `cu_seqlens[s]:cu_seqlens[s + 1]`.
        prefixes: (S,) int64; a sequence with `prefixes[s] = p >= 0` continues sequence `p`. -1 marks a sequence on its
            own, as does None for all.
        prefix_lengths: (S,) int64; how many positions of the sequence that it continues each one sees; None sees all.
        device: of the states, where it is not that of `cu_seqlens`. All three are read on the CPU.
    """

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        prefixes: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        device: torch.device | None = None,
    ):
        self.cu_seqlens = cu_seqlens.int().to(device or cu_seqlens.device)
        self.sequences = [Span(*bounds) for bounds in pairwise(cu_seqlens.tolist())]
        parents = [-1] * len(self.sequences) if prefixes is None else prefixes.tolist()
        lengths = [self.sequences[parent].length for parent in parents]
        if prefix_lengths is not None:
            lengths = prefix_lengths.tolist()
        # What each sequence sees of another one.
        self.seen = [
            Span(self.sequences[parent].start, self.sequences[parent].start + length) if parent >= 0 else Span(0, 0)
            for parent, length in zip(parents, lengths, strict=True)
        ]
        self.shares = any(own.length and seen.length for own, seen in zip(self.sequences, self.seen, strict=True))
        self.longest = longest(self.sequences)
        self._plans: dict[Callable, Any] = {}

    @property
    def size(self) -> int:
        return self.sequences[-1].end

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def plan(self, make: Callable[["PackLayout"], Plan]) -> Plan:
        """What `make` makes of this pack; it is made once, for all layers."""
        if make not in self._plans:
            self._plans[make] = make(self)
        return self._plans[make]


class Attend(Protocol):
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scaling: float
    ) -> torch.Tensor:
        """(N, heads, D) query, (N, kv_heads, D) key and value of a pack -> (N, heads, D); differentiable in all three.

        Some ways are for packs in which no sequence sees another one only.
        """
        ...


def longest(spans: Sequence[Span]) -> int:
    """An upper bound of their lengths, as kernels want it: at 1 these take their path for decoding, which is not the
    one that was tried."""
    return max([2, *(span.length for span in spans)])


def bounds_of(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """(len(spans) + 1,) int32 bounds of the spans laid behind one another."""
    lengths = torch.tensor([span.length for span in spans])
    return F.pad(lengths.cumsum(0), (1, 0)).int().to(device)


def by_dense_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scaling: float
) -> torch.Tensor:
    """The reference of every way: SDPA over the whole pack with an (N, N) mask."""
    mask = layout.plan(_dense_mask)
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)[0].transpose(0, 1)


def _dense_mask(layout: PackLayout) -> torch.Tensor:
    mask = torch.zeros(layout.size, layout.size, dtype=torch.bool)
    for own, seen in zip(layout.sequences, layout.seen, strict=True):
        mask[slice(*own), slice(*own)] = torch.ones(own.length, own.length, dtype=torch.bool).tril()
        mask[slice(*own), slice(*seen)] = True
    return mask.to(layout.device)
