"""Logits of the drawn tokens alone, in float32."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_count"], do_not_specialize_on_alignment=["index", "out"])
def target_logits_kernel(
    hidden, weight, bias, index, out, row_count, vocabulary, width, hidden_stride, weight_stride, column_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    chosen = tl.load(index + i).to(tl.int64)
    known = (chosen >= 0) & (chosen < vocabulary)
    width = tl.where(known, width, 0)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        h = tl.load(hidden + i * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + chosen * weight_stride + columns.to(tl.int64) * column_stride, mask=inside, other=0.0)
        total += h * w.to(tl.float32)
    logit = tl.sum(total, 0)
    if bias is not None:
        logit += tl.load(bias + chosen, mask=known, other=0.0).to(tl.float32)
    tl.store(out + i, tl.where(known, logit, float("-inf")))


def target_logits(hidden, weight, bias, index):
    """``(hidden * weight[index]).sum(-1) + bias[index]``, (M,) float32; -inf for an index outside of [0, V).

    hidden (M, H) contiguous, weight (V, H), bias (V,) or None, index (M,).
    """
    count, width = hidden.shape
    out = torch.empty(count, dtype=torch.float32, device=hidden.device)
    if count:
        target_logits_kernel[(count,)](
            hidden, weight, bias, index, out, count, weight.shape[0], width, hidden.stride(0), *weight.stride(),
            TILE=min(triton.next_power_of_2(width), 2048), num_warps=4,
        )  # fmt: skip
    return out
