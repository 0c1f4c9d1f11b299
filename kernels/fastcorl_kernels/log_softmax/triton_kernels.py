"""Triton kernels over rows of logits: log-probabilities and entropies, and the gradient of the logits.

A program walks whole rows. Nothing is added atomically, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

from fastcorl_kernels.log_softmax.triton_rows import load_target, row_statistics, write_row_gradient

MAX_TILE = 8192
WHOLE_ROW = 16384  # a row up to this long stays in registers between its two uses


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
        uncond_row = None
        grad_row = None
        grad_uncond_row = None
        if uncond is not None:
            uncond_row = uncond + place * uncond_row_stride
        if grad_logits is not None:
            grad_row = grad_logits + place * grad_row_stride
        if grad_uncond is not None:
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
        write_row_gradient(
            row,
            uncond_row,
            grad_row,
            grad_uncond_row,
            stride,
            uncond_stride,
            chosen,
            replaced,
            vocabulary,
            guidance,
            inverse_temperature,
            row_lse,
            grad_log_prob,
            entropy,
            grad_entropy,
            TILE,
        )


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

    That of ``uncond`` goes to ``uncond_out``; where one of the two is None, it is not written.

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
        strides(out)[0],
        strides(uncond_out)[0],
        guidance,
        inverse_temperatures,
        inverse_temperature,
        TILE=tile,
        num_warps=warps,
    )
