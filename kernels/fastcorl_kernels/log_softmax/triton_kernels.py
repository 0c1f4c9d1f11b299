"""Triton kernels over rows of logits: statistics of each row, and the gradient of its log-probability and entropy.

A program walks whole rows, a tile at a time, and keeps a running maximum, sum and weighted sum (online softmax), so a
row is read once for its statistics and once more for its gradient, which may overwrite the logits. All arithmetic is
float32. Nothing is added atomically, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

MAX_TILE = 8192
WHOLE_ROW = 16384  # a row up to this long stays in registers between its two uses


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
    """Write the gradient of the raw logits; guided logits hand guidance and 1 - guidance of it to their two parts."""
    grad *= inverse_temperature
    if grad_uncond_row is None:
        tl.store(grad_row + columns, grad.to(grad_row.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_row + columns, (guidance * grad).to(grad_row.dtype.element_ty), mask=inside)
        uncond_grad = (1.0 - guidance) * grad
        tl.store(grad_uncond_row + columns, uncond_grad.to(grad_uncond_row.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["row_count"],
    do_not_specialize_on_alignment=[
        "rows",
        "index",
        "target",
        "lse_out",
        "log_prob_out",
        "entropy_out",
        "inverse_temperatures",
    ],
)
def statistics_kernel(
    logits,
    uncond,
    rows,
    index,
    target,
    lse_out,
    log_prob_out,
    entropy_out,
    row_count,
    vocabulary,
    row_stride,
    stride,
    uncond_row_stride,
    uncond_stride,
    guidance,
    inverse_temperatures,
    inverse_temperature,
    TILE: tl.constexpr,
):
    for i in range(tl.program_id(0), row_count, tl.num_programs(0)):
        place = tl.cast(i, tl.int64)
        if rows is not None:
            place = tl.load(rows + i)
        row = logits + place * row_stride
        uncond_row = None
        if uncond is not None:
            uncond_row = uncond + place * uncond_row_stride
        if inverse_temperatures is not None:
            inverse_temperature = tl.load(inverse_temperatures + i)
        chosen = tl.load(index + i).to(tl.int64)
        if target is None:
            replaced = None
            logit = load_target(row, uncond_row, stride, uncond_stride, chosen, vocabulary, guidance)
        else:
            replaced = tl.load(target + i)
            logit = replaced
        lse, entropy = row_statistics(
            row,
            uncond_row,
            stride,
            uncond_stride,
            chosen,
            replaced,
            vocabulary,
            guidance,
            inverse_temperature,
            TILE,
        )
        tl.store(lse_out + i, lse)
        tl.store(log_prob_out + i, logit * inverse_temperature - lse)
        if entropy_out is not None:
            tl.store(entropy_out + i, entropy)


@triton.jit(
    do_not_specialize=["row_count"],
    do_not_specialize_on_alignment=[
        "rows",
        "index",
        "target",
        "lse",
        "grad_log_probs",
        "entropies",
        "grad_entropies",
        "inverse_temperatures",
    ],
)
def gradient_kernel(
    logits,
    uncond,
    rows,
    index,
    target,
    lse,
    grad_log_probs,
    entropies,
    grad_entropies,
    grad_logits,
    grad_uncond,
    row_count,
    vocabulary,
    row_stride,
    stride,
    uncond_row_stride,
    uncond_stride,
    grad_row_stride,
    grad_uncond_row_stride,
    guidance,
    inverse_temperatures,
    inverse_temperature,
    TILE: tl.constexpr,
):
    for i in range(tl.program_id(0), row_count, tl.num_programs(0)):
        place = tl.cast(i, tl.int64)
        if rows is not None:
            place = tl.load(rows + i)
        row = logits + place * row_stride
        grad_row = grad_logits + place * grad_row_stride
        uncond_row = None
        grad_uncond_row = None
        if uncond is not None:
            uncond_row = uncond + place * uncond_row_stride
            grad_uncond_row = grad_uncond + place * grad_uncond_row_stride
        if inverse_temperatures is not None:
            inverse_temperature = tl.load(inverse_temperatures + i)
        chosen = tl.load(index + i).to(tl.int64)
        replaced = None
        if target is not None:
            replaced = tl.load(target + i)
        row_lse = tl.load(lse + i)
        grad_log_prob = tl.load(grad_log_probs + i)
        entropy = None
        grad_entropy = None
        if grad_entropies is not None:
            entropy = tl.load(entropies + i)
            grad_entropy = tl.load(grad_entropies + i)
        for start in range(0, vocabulary, TILE):
            columns = start + tl.arange(0, TILE)
            inside = columns < vocabulary
            x = load_tile(
                row,
                uncond_row,
                columns,
                inside,
                stride,
                uncond_stride,
                chosen,
                replaced,
                guidance,
                inverse_temperature,
            )
            grad = tile_gradient(x, columns, chosen, row_lse, grad_log_prob, entropy, grad_entropy)
            store_gradient(grad, grad_row, grad_uncond_row, columns, inside, guidance, inverse_temperature)


def tile_and_warps(vocabulary, longest=None):
    """Columns per tile, a power of two up to ``longest``, and warps for it."""
    tile = min(triton.next_power_of_2(max(vocabulary, 1)), longest or MAX_TILE)
    return tile, max(4, min(16, tile // 512))


def program_count(row_count, device, per_processor=2):
    """Programs that walk ``row_count`` rows: few enough that their rows stay in the L2 cache between two sweeps."""
    if device.type != "cuda":
        return max(1, min(row_count, 2))
    return max(1, min(row_count, per_processor * _processors(device.index or 0)))


def _processors(device_index):
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _temperature_arguments(temperature):
    """(per-row reciprocals or None, one reciprocal)."""
    if isinstance(temperature, torch.Tensor):
        return temperature.float().reciprocal(), 1.0
    return None, 1.0 / temperature


def strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()


def row_log_probs(logits, index, temperature, want_entropy, *, rows=None, target=None, uncond=None, guidance=1.0):
    """(logsumexp, log_probs, entropy or None), each (M,) float32, at ``logits / temperature``.

    logits (N, V), any strides; ``rows`` (M,) int64 picks rows of it, None takes all. ``target`` (M,) float32 replaces
    the raw logits of ``index`` (M,). An index outside of [0, V) has log-probability -inf.
    """
    count = index.shape[0]
    lse, log_probs = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropy = torch.empty_like(lse) if want_entropy else None
    if count == 0:
        return lse, log_probs, entropy
    tile, warps = tile_and_warps(logits.shape[1])
    inverse_temperatures, inverse_temperature = _temperature_arguments(temperature)
    statistics_kernel[(program_count(count, logits.device, 4),)](
        logits,
        uncond,
        rows,
        index,
        target,
        lse,
        log_probs,
        entropy,
        count,
        logits.shape[1],
        *logits.stride(),
        *strides(uncond),
        guidance,
        inverse_temperatures,
        inverse_temperature,
        TILE=tile,
        num_warps=warps,
    )
    return lse, log_probs, entropy


def row_gradients(
    logits,
    index,
    temperature,
    lse,
    grad_log_probs,
    out,
    *,
    entropy=None,
    grad_entropy=None,
    rows=None,
    target=None,
    uncond=None,
    guidance=1.0,
    uncond_out=None,
):
    """Write the gradient of the raw logits of the picked rows to ``out`` (N, V), which may be ``logits`` itself.

    ``grad_log_probs`` and ``grad_entropy`` (M,) are the upstream gradients of ``row_log_probs``.
    """
    count = index.shape[0]
    if count == 0:
        return
    tile, warps = tile_and_warps(logits.shape[1])
    inverse_temperatures, inverse_temperature = _temperature_arguments(temperature)
    gradient_kernel[(program_count(count, logits.device, 4),)](
        logits,
        uncond,
        rows,
        index,
        target,
        lse,
        grad_log_probs.contiguous(),
        entropy,
        None if grad_entropy is None else grad_entropy.contiguous(),
        out,
        uncond_out,
        count,
        logits.shape[1],
        *logits.stride(),
        *strides(uncond),
        out.stride(0),
        0 if uncond_out is None else uncond_out.stride(0),
        guidance,
        inverse_temperatures,
        inverse_temperature,
        TILE=tile,
        num_warps=warps,
    )
