"""What a Triton program does with the tokens of a row: look them up in pages, and attend to them tile by tile.

The softmax is online, in powers of two: scores come scaled by log2(e) as well. All of it accumulates in float32.
"""

import triton
import triton.language as tl


@triton.jit
def shared_tokens(row, context, row_bounds, prefix_lengths, groups, GROUPS: tl.constexpr):
    """How many tokens of a row its group has read for it."""
    shared = 0
    if row_bounds is not None:
        i = tl.arange(0, GROUPS)
        bounds = tl.load(row_bounds + i, mask=i <= groups, other=2147483647)
        group = tl.sum((bounds <= row).to(tl.int32), 0) - 1
        length = tl.load(prefix_lengths + group, mask=(group >= 0) & (group < groups), other=0)
        shared = tl.minimum(length, context)
    return shared


@triton.jit
def load_tokens(
    pages,
    table,
    table_column_stride,
    tokens,
    inside,
    head,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(tokens, COLUMNS) of one head; 0 outside."""
    page = tl.load(table + (tokens // PAGE) * table_column_stride, mask=inside, other=0).to(tl.int64)
    place = (page * PAGE + tokens % PAGE) * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM
    columns = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pages + place[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def attend_one(
    q,
    key_pages,
    value_pages,
    table,
    table_column_stride,
    begin,
    end,
    head,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One scaled float32 query (COLUMNS,): maximum, sum and weighted values, (1,), (1,) and (1, COLUMNS).

    Tensor cores would be idle in 15 of 16 rows. Each of the BLOCK places in a tile has a softmax of its own, over the
    tokens that come by there, and they meet after the loop: inside of it no thread waits for another warp.
    """
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        k = load_tokens(key_pages, table, table_column_stride, tokens, inside, head, PAGE, KV_HEADS, HEAD_DIM, COLUMNS)
        v = load_tokens(
            value_pages, table, table_column_stride, tokens, inside, head, PAGE, KV_HEADS, HEAD_DIM, COLUMNS
        )
        scores = tl.where(inside, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        higher = tl.maximum(highest, scores)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - shift)
        fade = tl.exp2(highest - shift)
        total = total * fade + p
        weighted = weighted * fade[:, None] + p[:, None] * v.to(tl.float32)
        highest = higher
    top = tl.max(highest, 0)
    share = tl.exp2(highest - tl.where(top == float("-inf"), 0.0, top))
    one = tl.zeros((1,), tl.float32)
    return one + top, one + tl.sum(total * share, 0), tl.sum(weighted * share[:, None], 0)[None, :]


@triton.jit
def attend_together(
    q,
    limit,
    scale,
    key_pages,
    value_pages,
    table,
    table_column_stride,
    begin,
    end,
    head,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """QUERIES queries (QUERIES, COLUMNS) on the same tokens, each on those before its ``limit`` (QUERIES,)."""
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        k = load_tokens(key_pages, table, table_column_stride, tokens, inside, head, PAGE, KV_HEADS, HEAD_DIM, COLUMNS)
        v = load_tokens(
            value_pages, table, table_column_stride, tokens, inside, head, PAGE, KV_HEADS, HEAD_DIM, COLUMNS
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(tokens[None, :] < limit[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(p, 1)
        weighted = tl.dot(p.to(v.dtype), v, weighted * fade[:, None], input_precision="ieee")
        highest = higher
    return highest, total, weighted
