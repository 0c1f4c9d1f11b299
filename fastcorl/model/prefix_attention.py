"""Packs with shared prefixes on variable-length kernels: two calls, merged by their logsumexps.

One call is causal attention inside each sequence. In the other all positions that see the same prefix are the queries
of one segment, and the prefix its keys, without causality. With `l` the logsumexp of a query's logits over its own
sequence and `m` that over its prefix, its output is the mean of both outputs with weights `exp(l)` and `exp(m)`.

Backward is exact: given the merged output and logsumexp, a kernel's own backward computes for its part of the logits
the probabilities and gradients that these have in the whole softmax, as in ring attention (arXiv 2310.01889). What the
two parts give is added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from fastcorl.model.pack_layout import Attend, PackLayout, Span, bounds_of, longest
from fastcorl.model.varlen import repeated

Rows = slice | torch.Tensor  # positions: those of a slice are read in place, (n,) int64 ones are gathered


class Segments(NamedTuple):
    """P segments of queries and P of keys; queries see the keys of their segment. (P + 1,) int32 bounds of both."""

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    longest_queries: int
    longest_keys: int


class SegmentKernel(Protocol):
    """Attention inside segments, and its logsumexp. Causal segments have as many queries as keys."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scaling: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, heads, D) query, (K, kv_heads, D) key and value -> (Q, heads, D) output, (heads, Q) logsumexp."""
        ...

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scaling: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value, given that of the output; `out` and `lse` may be those of a softmax over
        more than these keys."""
        ...


@dataclass(frozen=True)
class TwoParts:
    """The segments of both calls, and which positions are queries and keys of the second."""

    own: Segments
    prefix: Segments
    queries: Rows
    keys: Rows


def two_parts(layout: PackLayout) -> TwoParts:
    """The calls for a pack in which sequences see others."""
    device = layout.device
    seers: dict[Span, list[Span]] = {}
    for own, seen in zip(layout.sequences, layout.seen, strict=True):
        if own.length and seen.length:
            seers.setdefault(seen, []).append(own)
    queries = [Span(0, sum(own.length for own in spans)) for spans in seers.values()]
    cu_queries, cu_keys = bounds_of(queries, device), bounds_of(list(seers), device)
    return TwoParts(
        own=Segments(layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest),
        prefix=Segments(cu_queries, cu_keys, longest(queries), longest(list(seers))),
        queries=_rows([own for spans in seers.values() for own in spans], device),
        keys=_rows(list(seers), device),
    )


def _rows(spans: list[Span], device: torch.device) -> Rows:
    if all(one.end == other.start for one, other in zip(spans, spans[1:], strict=False)):
        return slice(spans[0].start, spans[-1].end)
    return torch.cat([torch.arange(*span) for span in spans]).to(device)


class TwoPartAttention(torch.autograd.Function):
    """(N, heads, D) query, (N, kv_heads, D) key and value -> (N, heads, D)."""

    @staticmethod
    def forward(ctx, query, key, value, kernel: SegmentKernel, parts: TwoParts, scaling: float):
        out, lse = kernel.forward(query, key, value, parts.own, scaling, causal=True)
        if lse.shape != (query.shape[1], query.shape[0]):  # on a GPU, indexing it would end the process
            raise RuntimeError(f"its logsumexp has the shape {tuple(lse.shape)}, not (heads, positions)")
        seen = (query[parts.queries], key[parts.keys], value[parts.keys])
        prefix_out, prefix_lse = kernel.forward(*seen, parts.prefix, scaling, causal=False)
        own_out, own_lse = out[parts.queries], lse[:, parts.queries]
        exact = torch.promote_types(out.dtype, torch.float32)
        weight = torch.sigmoid(prefix_lse - own_lse).T[..., None].to(exact)
        out[parts.queries] = torch.lerp(own_out.to(exact), prefix_out.to(exact), weight).to(out.dtype)
        lse[:, parts.queries] = torch.logaddexp(own_lse, prefix_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel, ctx.parts, ctx.scaling = kernel, parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        kernel, parts, scaling = ctx.kernel, ctx.parts, ctx.scaling
        grad = grad.contiguous()  # kernels read it with the strides of the output
        gradients = kernel.backward(grad, query, key, value, out, lse, parts.own, scaling, causal=True)
        queries, keys = parts.queries, parts.keys
        lse = lse[:, queries].contiguous()
        states = (grad[queries], query[queries], key[keys], value[keys], out[queries], lse)
        others = kernel.backward(*states, parts.prefix, scaling, causal=False)
        for total, rows, part in zip(gradients, (queries, keys, keys), others, strict=True):
            if isinstance(rows, slice):
                total[rows] += part
            else:
                total.index_add_(0, rows, part)  # a position may be there several times, in prefixes of other lengths
        return *gradients, None, None, None


class PlainKernel:
    """The reference: a `SegmentKernel` in plain torch, for any device and type."""

    def forward(self, query, key, value, segments, scaling, causal):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = out.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
        for own, seen in _slices(segments):
            logits = self._logits(query[own], key[seen], scaling, causal)
            lse[:, own] = logits.logsumexp(-1)
            (values,) = repeated(query, value[seen])
            out[own] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)
        return out, lse

    def backward(self, grad, query, key, value, out, lse, segments, scaling, causal):
        gradients = tuple(torch.zeros_like(states) for states in (query, key, value))
        grad_query, grad_key, grad_value = gradients
        for own, seen in _slices(segments):
            keys, values = repeated(query, key[seen], value[seen])
            probabilities = (self._logits(query[own], key[seen], scaling, causal) - lse[:, own, None]).exp()
            grad_probabilities = torch.einsum("qhd,khd->hqk", grad[own], values)
            mean = torch.einsum("qhd,qhd->hq", grad[own], out[own])
            grad_logits = probabilities * (grad_probabilities - mean[..., None]) * scaling
            grad_query[own] = torch.einsum("hqk,khd->qhd", grad_logits, keys)
            for target, states, weights in (
                (grad_key, query[own], grad_logits),
                (grad_value, grad[own], probabilities),
            ):
                whole = torch.einsum("hqk,qhd->khd", weights, states)
                target[seen] = whole.unflatten(1, (key.shape[1], -1)).sum(2)
        return gradients

    @staticmethod
    def _logits(query, key, scaling, causal):
        """(heads, Q, K) of one segment."""
        (key,) = repeated(query, key)
        logits = torch.einsum("qhd,khd->hqk", query, key) * scaling
        if causal:
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(hidden, float("-inf"))
        return logits


def _slices(segments: Segments) -> list[tuple[slice, slice]]:
    """Queries and keys of each segment that has any."""
    queries, keys = segments.cu_queries.tolist(), segments.cu_keys.tolist()
    bounds = zip(queries, queries[1:], keys, keys[1:], strict=False)
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in bounds if q1 > q0]


class TorchKernel:
    """The flash kernels in torch, as `torch.nn.attention.varlen` calls them (torch 2.11 to 2.13)."""

    def forward(self, query, key, value, segments, scaling, causal):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *segments, 0.0, causal, False, scale=scaling
        )
        return out, lse

    def backward(self, grad, query, key, value, out, lse, segments, scaling, causal):
        rng_state, unused = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # no dropout
        states = (grad, query, key, value, out, lse)
        return torch.ops.aten._flash_attention_backward(
            *states, *segments, 0.0, causal, rng_state, unused, scale=scaling
        )


class FlashAttnKernel:
    """The kernels of the flash_attn package (2.7 and 2.8), which offers no public backward."""

    def __init__(self):
        from flash_attn import flash_attn_interface

        self.run = flash_attn_interface._flash_attn_varlen_forward
        self.run_back = flash_attn_interface._flash_attn_varlen_backward

    def forward(self, query, key, value, segments, scaling, causal):
        out, lse, *_ = self.run(query, key, value, *segments, dropout_p=0.0, softmax_scale=scaling, causal=causal)
        return out, lse

    def backward(self, grad, query, key, value, out, lse, segments, scaling, causal):
        gradients = tuple(
            torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value)
        )
        self.run_back(
            *(grad, query, key, value, out, lse),
            *gradients,
            *segments,
            dropout_p=0.0,
            softmax_scale=scaling,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients


def in_two_parts(kernel: SegmentKernel) -> Attend:
    """The way to attend in two parts that `kernel` computes; for packs in which sequences see others."""

    def attend(query, key, value, layout, scaling):
        return TwoPartAttention.apply(query, key, value, kernel, layout.plan(two_parts), scaling)

    return attend


# In the order of preference.
KERNELS: dict[str, Callable[[], SegmentKernel]] = {"flash_attn": FlashAttnKernel, "torch": TorchKernel}
