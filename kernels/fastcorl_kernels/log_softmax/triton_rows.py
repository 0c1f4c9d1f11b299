"""What a Triton program does with one row of logits: its statistics, and the gradient of the logits.

A row is walked a tile at a time with a running maximum, sum and weighted sum (online softmax): it is read once for its
statistics and once more for its gradient, which may overwrite the logits. All arithmetic is float32.
"""

import triton
import triton.language as tl


@triton.jit
def guided(c, u, inside, guidance):
    """u + guidance * (c - u); -inf where both are, and outside of the row."""
    both = (c == float("-inf")) & (u == float("-inf"))
    return tl.where(inside & (both == 0), u + guidance * (c - u), float("-inf"))


@triton.jit
def load_tile(row, uncond_row, columns, inside, stride, uncond_stride, index, target, guidance, inverse_temperature):
    """Logits of one tile over the temperature, float32; -inf outside of the row.

    With ``uncond_row`` they are the guided logits u + guidance * (c - u). ``target``, where given, replaces the logit
    of ``index``.
    """
    x = tl.load(row + columns.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    if uncond_row is not None:
        u = tl.load(uncond_row + columns.to(tl.int64) * uncond_stride, mask=inside, other=0.0).to(tl.float32)
        x = guided(x, u, inside, guidance)
    if target is not None:
        x = tl.where(columns == index, target, x)
    return x * inverse_temperature


@triton.jit
def load_target(row, uncond_row, stride, uncond_stride, index, vocabulary, guidance):
    """The raw logit of ``index``, float32; -inf where ``index`` is not in the row."""
    inside = (index >= 0) & (index < vocabulary)
    x = tl.load(row + index * stride, mask=inside, other=float("-inf")).to(tl.float32)
    if uncond_row is not None:
        u = tl.load(uncond_row + index * uncond_stride, mask=inside, other=0.0).to(tl.float32)
        x = guided(x, u, inside, guidance)
    return x


@triton.jit
def tile_statistics(x):
    """Maximum m, sum of exp(x - m), and sum of (x - m) exp(x - m), where exp = 0 adds nothing."""
    highest = tl.max(x, 0)
    distance = x - tl.where(highest == float("-inf"), 0.0, highest)
    e = tl.exp(distance)
    return highest, tl.sum(e, 0), tl.sum(tl.where(e == 0.0, 0.0, distance * e), 0)


@triton.jit
def merge_statistics(m, s, t, tile_m, tile_s, tile_t):
    """Statistics of two parts of a row together."""
    highest = tl.maximum(m, tile_m)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    gap = tl.where(m == float("-inf"), 0.0, m - shift)
    tile_gap = tl.where(tile_m == float("-inf"), 0.0, tile_m - shift)
    scale, tile_scale = tl.exp(gap), tl.exp(tile_gap)
    total = scale * s + tile_scale * tile_s
    return highest, total, scale * (t + gap * s) + tile_scale * (tile_t + tile_gap * tile_s)


@triton.jit
def row_statistics(
    row, uncond_row, stride, uncond_stride, index, target, vocabulary, guidance, inverse_temperature, TILE: tl.constexpr
):
    """(logsumexp, entropy) of one row, read once."""
    m = float("-inf")
    s = 0.0
    t = 0.0
    for start in tl.range(0, vocabulary, TILE, num_stages=3):  # loads run ahead of the reductions
        columns = start + tl.arange(0, TILE)
        x = load_tile(
            row,
            uncond_row,
            columns,
            columns < vocabulary,
            stride,
            uncond_stride,
            index,
            target,
            guidance,
            inverse_temperature,
        )
        tile_m, tile_s, tile_t = tile_statistics(x)
        m, s, t = merge_statistics(m, s, t, tile_m, tile_s, tile_t)
    return m + tl.log(s), tl.log(s) - t / s


@triton.jit
def tile_gradient(x, columns, index, lse, grad_log_prob, entropy, grad_entropy):
    """Gradient with respect to ``x``: of grad_log_prob * log_prob, and of grad_entropy * entropy where given."""
    p = tl.exp(x - lse)
    grad = tl.where(columns == index, grad_log_prob, 0.0) - grad_log_prob * p
    if grad_entropy is not None:
        grad -= tl.where(p == 0.0, 0.0, grad_entropy * p * (x - lse + entropy))
    return grad


@triton.jit
def store_gradient(grad, grad_row, grad_uncond_row, columns, inside, guidance, inverse_temperature):
    """Write the gradient of the raw logits to the rows that are not None.

    Guided logits hand guidance and 1 - guidance of it to their two parts; guidance is 1 for others.
    """
    grad *= inverse_temperature
    if grad_row is not None:
        tl.store(grad_row + columns, (guidance * grad).to(grad_row.dtype.element_ty), mask=inside)
    if grad_uncond_row is not None:
        uncond_grad = (1.0 - guidance) * grad
        tl.store(grad_uncond_row + columns, uncond_grad.to(grad_uncond_row.dtype.element_ty), mask=inside)


@triton.jit
def write_row_gradient(
    row,
    uncond_row,
    grad_row,
    grad_uncond_row,
    stride,
    uncond_stride,
    index,
    target,
    vocabulary,
    guidance,
    inverse_temperature,
    lse,
    grad_log_prob,
    entropy,
    grad_entropy,
    TILE: tl.constexpr,
):
    """The gradient of one row of raw logits, which are read once more; it may overwrite them."""
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < vocabulary
        x = load_tile(
            row, uncond_row, columns, inside, stride, uncond_stride, index, target, guidance, inverse_temperature
        )
        grad = tile_gradient(x, columns, index, lse, grad_log_prob, entropy, grad_entropy)
        store_gradient(grad, grad_row, grad_uncond_row, columns, inside, guidance, inverse_temperature)
