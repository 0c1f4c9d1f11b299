"""Triton kernels that decode one token per row over pages of keys and values.

A context is cut into splits of a fixed number of tokens, whose results are merged in order: what a row gives depends
neither on the other rows nor on how many pages its table could hold. Decoding is bound by reading keys and values.
"""

import math

import torch
import triton
import triton.language as tl

from fastcorl_kernels.paged_attention.triton_tiles import attend_one, attend_together, shared_tokens

SPLIT = 256  # tokens per program: hundreds of KiB to stream, and yet a few long rows make many programs
# A tile of keys is 32 tokens of 128 columns in bfloat16. By the compiler's figures, not by measurement: with 64
# tokens a thread takes 210 registers, and two programs fit on an SM; with 32 it takes 150 or fewer, and at least three
# fit, which cover each other's start, a chain of three loads (length, page, keys).
TILE_BYTES = 8192
TILE_TOKENS = 64  # at most
# Page numbers are loaded one stage before the keys, and products of tiles take a stage more: these are three buffers of
# keys and values for one query, two for several.
STAGES_ONE, STAGES_TOGETHER = 4, 5
PREFIX_QUERIES = 32  # per program that reads a shared prefix; 64 would take all 255 registers
ROPE_HEADS = 8  # per program, so that a row of 48 heads is a handful of programs with wide loads


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rope_to_pages_kernel(
    qkv,
    cos,
    sin,
    positions,
    slots,
    query,
    key_pages,
    value_pages,
    row_stride,
    column_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (head < QUERY_HEADS + 2 * KV_HEADS) & (columns < HALF)
    source = qkv + row * row_stride + (head * (2 * HALF) + columns).to(tl.int64) * column_stride
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF * column_stride, mask=inside, other=0.0).to(tl.float32)
    angle = tl.load(positions + row).to(tl.int64) * (2 * HALF) + columns
    c = tl.load(cos + angle, mask=columns < HALF, other=0.0)
    s = tl.load(sin + angle, mask=columns < HALF, other=0.0)
    turns = head < QUERY_HEADS + KV_HEADS
    low = tl.where(turns, first * c - second * s, first).to(query.dtype.element_ty)
    high = tl.where(turns, second * c + first * s, second).to(query.dtype.element_ty)
    slot = tl.load(slots + row).to(tl.int64)
    store_heads(query + row * (QUERY_HEADS * 2 * HALF), low, high, head, 0, QUERY_HEADS, HALF, columns)
    page = slot * (KV_HEADS * 2 * HALF)
    store_heads(key_pages + page, low, high, head, QUERY_HEADS, KV_HEADS, HALF, columns)
    store_heads(value_pages + page, low, high, head, QUERY_HEADS + KV_HEADS, KV_HEADS, HALF, columns)


@triton.jit
def store_heads(target, low, high, head, FIRST: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr, columns):
    """Write those of the heads that are FIRST to FIRST + COUNT."""
    mine = (head >= FIRST) & (head < FIRST + COUNT) & (columns < HALF)
    place = target + (head - FIRST) * (2 * HALF) + columns
    tl.store(place, low, mask=mine)
    tl.store(place + HALF, high, mask=mine)


@triton.jit(
    do_not_specialize=["table_stride", "slots", "groups"],
    do_not_specialize_on_alignment=["block_table", "context_lengths", "row_bounds", "prefix_lengths"],
)
def decode_kernel(
    query,
    key_pages,
    value_pages,
    block_table,
    context_lengths,
    row_bounds,
    prefix_lengths,
    out,
    lse_out,
    scale,
    table_stride,
    table_column_stride,
    slots,
    groups,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of one row for the SHARE query heads of one head of keys."""
    # The heads of a token lie side by side in its page, so the programs that run together are those of a row.
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    context = tl.load(context_lengths + row).to(tl.int32)
    shared = shared_tokens(row, context, row_bounds, prefix_lengths, groups, GROUPS)
    begin = shared + split * SPLIT
    if (begin >= context) & (split > 0):
        return
    end = tl.minimum(begin + SPLIT, context)

    i = tl.arange(0, QUERIES)
    columns = tl.arange(0, COLUMNS)
    heads = row * (KV_HEADS * SHARE) + head * SHARE + i
    chosen = (i < SHARE)[:, None] & (columns < HEAD_DIM)[None, :]
    table = block_table + row * table_stride
    if QUERIES == 1:
        first = query + (row * KV_HEADS + head) * HEAD_DIM
        q = tl.load(first + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32) * scale
        highest, total, weighted = attend_one(
            q,
            key_pages,
            value_pages,
            table,
            table_column_stride,
            begin,
            end,
            head,
            PAGE,
            KV_HEADS,
            HEAD_DIM,
            COLUMNS,
            BLOCK,
            STAGES,
        )
    else:
        highest, total, weighted = attend_together(
            tl.load(query + heads[:, None] * HEAD_DIM + columns[None, :], mask=chosen, other=0.0),
            tl.zeros((QUERIES,), tl.int32) + end,
            scale,
            key_pages,
            value_pages,
            table,
            table_column_stride,
            begin,
            end,
            head,
            PAGE,
            KV_HEADS,
            HEAD_DIM,
            COLUMNS,
            QUERIES,
            BLOCK,
            STAGES,
        )
    # A row without tokens has a total of 0; one with NaN keeps it.
    result = tl.where(total[:, None] == 0.0, 0.0, weighted / total[:, None])
    slot = heads * slots + (shared + SPLIT - 1) // SPLIT + split
    place = out + slot[:, None] * HEAD_DIM + columns[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=chosen)
    if lse_out is not None:
        tl.store(lse_out + slot, highest + tl.log2(total), mask=i < SHARE)


@triton.jit(
    do_not_specialize=["table_stride", "slots"],
    do_not_specialize_on_alignment=["block_table", "context_lengths", "row_bounds", "prefix_lengths"],
)
def prefix_kernel(
    query,
    key_pages,
    value_pages,
    block_table,
    context_lengths,
    row_bounds,
    prefix_lengths,
    out,
    lse_out,
    scale,
    table_stride,
    table_column_stride,
    slots,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of a shared prefix for QUERIES queries of its group, at one head of keys."""
    group = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    begin = tl.program_id(1) * SPLIT
    first_query = tl.program_id(2) * QUERIES
    first_row = tl.load(row_bounds + group).to(tl.int64)
    stop = tl.load(row_bounds + group + 1).to(tl.int64)
    length = tl.load(prefix_lengths + group)
    if (begin >= length) | (first_row + first_query // SHARE >= stop):
        return
    end = tl.minimum(begin + SPLIT, length)
    i = first_query + tl.arange(0, QUERIES)
    rows = first_row + i // SHARE
    present = rows < stop
    limit = tl.minimum(tl.load(context_lengths + rows, mask=present, other=0).to(tl.int32), end)

    columns = tl.arange(0, COLUMNS)
    heads = rows * (KV_HEADS * SHARE) + head * SHARE + i % SHARE
    chosen = present[:, None] & (columns < HEAD_DIM)[None, :]
    highest, total, weighted = attend_together(
        tl.load(query + heads[:, None] * HEAD_DIM + columns[None, :], mask=chosen, other=0.0),
        limit,
        scale,
        key_pages,
        value_pages,
        block_table + first_row * table_stride,
        table_column_stride,
        begin,
        end,
        head,
        PAGE,
        KV_HEADS,
        HEAD_DIM,
        COLUMNS,
        QUERIES,
        BLOCK,
        STAGES,
    )
    slot = heads * slots + tl.program_id(1)
    place = out + slot[:, None] * HEAD_DIM + columns[None, :]
    # A row whose context ends before this split gets NaN here, and does not merge it.
    tl.store(place, weighted / total[:, None], mask=chosen)
    tl.store(lse_out + slot, highest + tl.log2(total), mask=present)


@triton.jit(
    do_not_specialize=["slots", "groups"],
    do_not_specialize_on_alignment=["context_lengths", "row_bounds", "prefix_lengths"],
)
def merge_kernel(
    partial,
    lse,
    context_lengths,
    row_bounds,
    prefix_lengths,
    out,
    slots,
    groups,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The splits of one row and head, those of its prefix first."""
    head = tl.program_id(0).to(tl.int64)
    row = head // HEADS
    context = tl.load(context_lengths + row).to(tl.int32)
    shared = shared_tokens(row, context, row_bounds, prefix_lengths, groups, GROUPS)
    splits = (shared + SPLIT - 1) // SPLIT + (context - shared + SPLIT - 1) // SPLIT
    columns = tl.arange(0, COLUMNS)
    highest = float("-inf")
    total = 0.0
    weighted = tl.zeros((COLUMNS,), tl.float32)
    for i in range(splits):
        slot = head * slots + i
        part = tl.load(partial + slot * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        height = tl.load(lse + slot)
        higher = tl.maximum(highest, height)
        fade, share = tl.exp2(highest - higher), tl.exp2(height - higher)
        total = total * fade + share
        weighted = weighted * fade + part * share
        highest = higher
    # The exact division leaves a lone split as it is: a longer table changes no bit.
    result = tl.where(total == 0.0, 0.0, tl.div_rn(weighted, tl.zeros((COLUMNS,), tl.float32) + total))
    tl.store(out + head * HEAD_DIM + columns, result.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def rope_to_pages_triton(qkv, cos, sin, positions, slots, key_pages, value_pages):
    """See ``rope_to_pages``."""
    kv_heads, head_dim = key_pages.shape[2:]
    heads = qkv.shape[1] // head_dim
    query = torch.empty(qkv.shape[0], heads - 2 * kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if qkv.shape[0]:
        rope_to_pages_kernel[(qkv.shape[0], triton.cdiv(heads, ROPE_HEADS))](
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            positions.contiguous(),
            slots.contiguous(),
            query,
            key_pages,
            value_pages,
            *qkv.stride(),
            QUERY_HEADS=query.shape[1],
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            COLUMNS=triton.next_power_of_2(head_dim // 2),
            HEADS=ROPE_HEADS,
            num_warps=2,
        )
    return query


def paged_decode_attention_triton(query, key_pages, value_pages, block_table, context_lengths, scaling, prefix):
    """See ``paged_decode_attention``. Grids come from shapes alone, so that a CUDA graph can hold the launches."""
    rows, heads, head_dim = query.shape
    page_size, kv_heads = key_pages.shape[1:3]
    out = torch.empty(rows, heads, head_dim, dtype=query.dtype, device=query.device)
    if rows == 0:
        return out
    groups = 0 if prefix is None else prefix.lengths.shape[0]
    row_bounds = prefix_lengths = None
    if groups:
        row_bounds, prefix_lengths = prefix.row_bounds.contiguous(), prefix.lengths.contiguous()
    splits = max(triton.cdiv(block_table.shape[1] * page_size, SPLIT), 1)
    slots = splits + (groups > 0)  # two parts of a context have one split more, at most, than the whole
    partial, lse = out, None
    if slots > 1:
        partial, lse = (
            torch.empty(*shape, dtype=torch.float32, device=query.device)
            for shape in ((rows, heads, slots, head_dim), (rows, heads, slots))
        )
    columns = max(triton.next_power_of_2(head_dim), 16)  # products of tiles take no less
    block = max(min(TILE_TOKENS, TILE_BYTES // (columns * query.element_size())), 16)
    share = heads // kv_heads
    members = 1 if share == 1 else max(triton.next_power_of_2(share), 16)
    context_lengths = context_lengths.contiguous()
    sizes = {"SPLIT": SPLIT, "HEAD_DIM": head_dim, "COLUMNS": columns}
    bounds = {"GROUPS": triton.next_power_of_2(groups + 1)}
    layout = {"PAGE": page_size, "KV_HEADS": kv_heads, "SHARE": share, "BLOCK": block, "num_warps": 4}
    operands = (query.contiguous(), key_pages, value_pages, block_table, context_lengths, row_bounds, prefix_lengths)
    numbers = (scaling * math.log2(math.e), *block_table.stride(), slots)
    if groups:
        queries = max(min(triton.next_power_of_2(prefix.max_group * share), PREFIX_QUERIES), 16)
        prefix_kernel[(groups * kv_heads, splits, triton.cdiv(prefix.max_group * share, queries))](
            *operands, partial, lse, *numbers, **sizes, **layout, QUERIES=queries, STAGES=STAGES_TOGETHER
        )
    decode_kernel[(rows * kv_heads, splits)](
        *operands,
        partial,
        lse,
        *numbers,
        groups,
        **sizes,
        **layout,
        **bounds,
        QUERIES=members,
        STAGES=STAGES_ONE if members == 1 else STAGES_TOGETHER,
    )
    if slots > 1:
        merge_kernel[(rows * heads,)](
            partial,
            lse,
            context_lengths,
            row_bounds,
            prefix_lengths,
            out,
            slots,
            groups,
            **sizes,
            **bounds,
            HEADS=heads,
            num_warps=1,
        )
    return out
