"""Decoding one token per row over a paged cache of keys and values."""

from dataclasses import dataclass

import torch

from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import (
    accumulator_dtype,
    check_float_matrix,
    check_index_range,
    check_index_vector,
    check_number,
    is_integer,
    require,
)
from fastcorl_kernels.log_softmax.autograd import op_context
from fastcorl_kernels.paged_attention.reference import paged_decode_attention_reference, rope_to_pages_reference


@dataclass(frozen=True)
class SharedPrefix:
    """Groups of neighbouring rows whose contexts begin with the same tokens in the same pages.

    Rows ``row_bounds[g]:row_bounds[g + 1]`` share their first ``lengths[g]`` tokens; rows outside of all groups share
    nothing, and a group may be empty. The pages of a group are those in the table of its first row, even where that
    row's own context has length 0.

    Args:
        row_bounds: (groups + 1,) int32, ascending.
        lengths: (groups,) int32, multiples of the page size; 0 is allowed.
        max_group: the most rows that a group has.
    """

    row_bounds: torch.Tensor
    lengths: torch.Tensor
    max_group: int


@torch.no_grad()
def rope_to_pages(qkv, cos, sin, positions, slots, key_pages, value_pages, *, backend=None):
    """Rotate the new queries and keys of one token per row, and write its key and value into their pages.

    Args:
        qkv: (R, (Hq + 2 * Hkv) * D) floating tensor, any strides: the fused projection, the heads of the queries
            before those of the keys before those of the values. Hq is a multiple of Hkv, D is even.
        cos, sin: (max_positions, D) float32 (float64 for float64 ``qkv``), for rotations of pairs (i, i + D / 2) as
            in Llama: the second half of a row repeats the first.
        positions: (R,) int32 or int64, rows of ``cos`` and ``sin``.
        slots: (R,) int32 or int64, ``page * page_size + offset``. Rows may share a slot: any of them wins it.
        key_pages, value_pages: (pages, page_size, Hkv, D) contiguous, in the dtype of ``qkv``; written in place.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA (torch for float64).

    Returns:
        The rotated queries (R, Hq, D) in the dtype of ``qkv``, without gradient. The rotation is in float32, or in
        float64 for float64. The host never waits for the device.

    Raises:
        ValueError: naming the argument that does not fit (positions and slots out of range: on the CPU only).
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    check_float_matrix(qkv, "qkv", "(R, (Hq + 2 * Hkv) * D)")
    _check_pages(key_pages, value_pages, qkv)
    pages, page_size, kv_heads, head_dim = key_pages.shape
    require(head_dim % 2 == 0, "key_pages", "an even head size", key_pages)
    query_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    fits = qkv.shape[1] % head_dim == 0 and query_heads >= 1 and query_heads % kv_heads == 0
    width = f"(R, (Hq + {2 * kv_heads}) * {head_dim}), Hq a multiple of {kv_heads}"
    require(fits, "qkv", f"shape {width}", qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(table, name, head_dim, qkv)
    require(sin.shape == cos.shape, "sin", f"the shape of cos, {tuple(cos.shape)}", sin)
    check_index_vector(positions, "positions", qkv.shape[0], qkv)
    check_index_vector(slots, "slots", qkv.shape[0], qkv)
    check_index_range(positions, "positions", cos.shape[0])
    check_index_range(slots, "slots", pages * page_size)
    write = rope_to_pages_reference
    if resolve_backend(backend, qkv) == "triton":
        from fastcorl_kernels.paged_attention.triton_kernels import rope_to_pages_triton as write

    with op_context(qkv):
        return write(qkv, cos, sin, positions, slots, key_pages, value_pages)


@torch.no_grad()
def paged_decode_attention(
    query, key_pages, value_pages, block_table, context_lengths, *, scaling=None, prefix=None, backend=None
):
    """Softmax attention of one query per row and head to the tokens that the row has in pages.

    Args:
        query: (R, Hq, D) floating tensor, any strides. Hq is a multiple of Hkv: head h reads ``h // (Hq / Hkv)``.
        key_pages, value_pages: (pages, page_size, Hkv, D) contiguous, in the dtype of ``query``; page_size a power of
            two. What a row does not attend to may be anything, NaN included.
        block_table: (R, P) int32, any strides: the pages of each row in order. What lies behind a row's last page is
            not read.
        context_lengths: (R,) int32 or int64, the tokens to attend to, from 0, which gives zeros, to P * page_size.
        scaling: positive factor of the scores; D ** -0.5 by default.
        prefix: None or a ``SharedPrefix``, whose tokens are then read once per group instead of once per row. It
            changes the speed, and the result by rounding only.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA (torch for float64).

    Returns:
        (R, Hq, D) in the dtype of ``query``, without gradient; accumulated in float32, or in float64 for float64.
        Under Triton a row's result depends, bit for bit, on nothing but the row and, with ``prefix``, the length that
        it shares and ``max_group``; the host never waits for the device.

    Raises:
        ValueError: naming the argument that does not fit (what the device's memory holds: on the CPU only).
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    fits = isinstance(query, torch.Tensor) and query.dim() == 3 and query.is_floating_point()
    require(fits, "query", "a floating tensor of shape (R, Hq, D)", query)
    _check_pages(key_pages, value_pages, query)
    pages, page_size, kv_heads, head_dim = key_pages.shape
    fits = query.shape[2] == head_dim and query.shape[1] % kv_heads == 0 and query.shape[1] > 0
    require(fits, "query", f"shape (R, Hq, {head_dim}), Hq a multiple of {kv_heads}", query)
    rows = query.shape[0]
    fits = isinstance(block_table, torch.Tensor) and block_table.dim() == 2 and block_table.shape[0] == rows
    fits = fits and block_table.dtype == torch.int32 and block_table.device == query.device
    require(fits, "block_table", f"an int32 tensor of shape ({rows}, P) on {query.device}", block_table)
    check_index_vector(context_lengths, "context_lengths", rows, query)
    check_index_range(context_lengths, "context_lengths", block_table.shape[1] * page_size + 1)
    if query.device.type == "cpu":
        begins = torch.arange(block_table.shape[1]) * page_size
        check_index_range(block_table, "block_table", pages, begins < context_lengths[:, None])
    if scaling is None:
        scaling = head_dim**-0.5
    check_number(scaling, "scaling", exclusive=True)
    if prefix is not None:
        _check_prefix(prefix, block_table, context_lengths, page_size)
    attend = paged_decode_attention_reference
    if resolve_backend(backend, query) == "triton":
        from fastcorl_kernels.paged_attention.triton_kernels import paged_decode_attention_triton as attend

    with op_context(query):
        return attend(query, key_pages, value_pages, block_table, context_lengths, scaling, prefix)


def _check_pages(key_pages, value_pages, like):
    dtype = str(like.dtype).removeprefix("torch.")
    expected = f"a contiguous {dtype} tensor of shape (pages, page_size, Hkv, D) on {like.device}"
    for name, value in (("key_pages", key_pages), ("value_pages", value_pages)):
        fits = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_contiguous()
        require(fits and value.dtype == like.dtype and value.device == like.device, name, expected, value)
    _, page_size, kv_heads, head_dim = key_pages.shape
    fits = page_size.bit_count() == 1 and kv_heads > 0 and head_dim > 0
    require(fits, "key_pages", "a page size that is a power of two, and at least one head", key_pages)
    shape = tuple(key_pages.shape)
    require(value_pages.shape == key_pages.shape, "value_pages", f"the shape of key_pages, {shape}", value_pages)


def _check_table(table, name, head_dim, qkv):
    dtype = accumulator_dtype(qkv)
    fits = isinstance(table, torch.Tensor) and table.dim() == 2 and table.shape[1] == head_dim
    fits = fits and table.dtype == dtype and table.device == qkv.device
    described = f"a {str(dtype).removeprefix('torch.')} tensor of shape (max_positions, {head_dim}) on {qkv.device}"
    require(fits, name, described, table)


def _check_prefix(prefix, block_table, context_lengths, page_size):
    """The plain torch path does not use the prefix, so that a wrong one would show on a GPU only: looked at here."""
    require(isinstance(prefix, SharedPrefix), "prefix", "None or a SharedPrefix", prefix)
    lengths, bounds, most = prefix.lengths, prefix.row_bounds, prefix.max_group
    fits = isinstance(lengths, torch.Tensor) and lengths.dim() == 1 and lengths.dtype == torch.int32
    on_device = fits and lengths.device == block_table.device
    require(on_device, "prefix.lengths", f"an int32 tensor of shape (groups,) on {block_table.device}", lengths)
    fits = isinstance(bounds, torch.Tensor) and tuple(bounds.shape) == (len(lengths) + 1,)
    fits = fits and bounds.dtype == torch.int32 and bounds.device == block_table.device
    expected = f"an int32 tensor of shape ({len(lengths) + 1},) on {block_table.device}"
    require(fits, "prefix.row_bounds", expected, bounds)
    require(is_integer(most, 1), "prefix.max_group", "an integer of at least 1", most)
    if block_table.device.type != "cpu":
        return
    rows, capacity = block_table.shape[0], block_table.shape[1] * page_size
    starts, stops = bounds[:-1].tolist(), bounds[1:].tolist()
    for start, stop, length in zip(starts, stops, lengths.tolist(), strict=True):
        fits = 0 <= start <= stop <= rows and stop - start <= most
        require(fits, "prefix.row_bounds", f"ascending rows up to {rows}, at most {most} in a group", (start, stop))
        fits = 0 <= length <= capacity and length % page_size == 0
        require(fits, "prefix.lengths", f"multiples of {page_size} up to {capacity}", length)
        shared = block_table[start:stop, : length // page_size]
        same = (shared == shared[:1]).all(dim=1) | (context_lengths[start:stop] == 0)
        require(bool(same.all()), "prefix.lengths", f"the same pages in rows {start} to {stop - 1}", length)
