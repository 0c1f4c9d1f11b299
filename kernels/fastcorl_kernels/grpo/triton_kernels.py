"""Triton kernels of the GRPO losses with a ratio per token.

One launch takes a row from logits to its loss, its metrics and the gradient of its logits. A second, of one program,
adds the rows up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from fastcorl_kernels.grpo.triton_objective import token_objective
from fastcorl_kernels.log_softmax.triton_kernels import WHOLE_ROW, program_count, strides, tile_and_warps
from fastcorl_kernels.log_softmax.triton_rows import (
    load_target,
    load_tile,
    row_statistics,
    store_gradient,
    tile_gradient,
    tile_statistics,
    write_row_gradient,
)

TERMS = 5  # loss, entropy, k3, whether a bound replaced the ratio, ratio


# Slices of row vectors begin anywhere, and a new alignment must not compile the kernel anew.
@triton.jit(
    do_not_specialize=["row_count", "term_stride"],
    do_not_specialize_on_alignment=[
        "mask",
        "index",
        "target",
        "advantages",
        "weights",
        "grad_weights",
        "old_log_probs",
        "ref_log_probs",
        "log_probs",
        "terms",
    ],
)
def grpo_rows_kernel(
    logits,
    uncond,
    mask,
    index,
    target,
    advantages,
    weights,
    grad_weights,
    old_log_probs,
    ref_log_probs,
    log_probs,
    terms,
    grad_logits,
    grad_uncond,
    row_count,
    term_stride,
    vocabulary,
    row_stride,
    stride,
    uncond_row_stride,
    uncond_stride,
    grad_row_stride,
    grad_uncond_row_stride,
    guidance,
    inverse_temperature,
    beta,
    low,
    high,
    delta,
    CISPO: tl.constexpr,
    CLIP: tl.constexpr,
    DELTA: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    offsets = tl.arange(0, TILE)
    for i in range(tl.program_id(0), row_count, tl.num_programs(0)):
        place = tl.cast(i, tl.int64)
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
        counts = True
        if mask is not None:
            counts = tl.load(mask + i) != 0
        if counts:
            chosen = tl.load(index + i).to(tl.int64)
            if target is None:
                replaced = None
                logit = load_target(row, uncond_row, stride, uncond_stride, chosen, vocabulary, guidance)
            else:
                replaced = tl.load(target + i)
                logit = replaced
            if WHOLE:
                x = load_tile(
                    row,
                    uncond_row,
                    offsets,
                    offsets < vocabulary,
                    stride,
                    uncond_stride,
                    chosen,
                    replaced,
                    guidance,
                    inverse_temperature,
                )
                m, s, t = tile_statistics(x)
                lse, entropy = m + tl.log(s), tl.log(s) - t / s
            else:
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
            log_prob = logit * inverse_temperature - lse
            old = log_prob
            if old_log_probs is not None:
                old = tl.load(old_log_probs + i)
            ref = None
            if ref_log_probs is not None:
                ref = tl.load(ref_log_probs + i)
            loss, grad_log_prob, kl, bounded, ratio = token_objective(
                log_prob, old, ref, tl.load(advantages + i), beta, low, high, delta, CISPO, CLIP, DELTA
            )
            tl.store(terms + i, tl.load(weights + i) * loss)
            tl.store(terms + term_stride + i, entropy)
            tl.store(terms + 2 * term_stride + i, kl)
            tl.store(terms + 3 * term_stride + i, bounded.to(tl.float32))
            tl.store(terms + 4 * term_stride + i, ratio)
            tl.store(log_probs + i, log_prob)
            if (grad_logits is not None) or (grad_uncond is not None):
                grad_log_prob *= tl.load(grad_weights + i)
                if WHOLE:
                    grad = tile_gradient(x, offsets, chosen, lse, grad_log_prob, None, None)
                    inside = offsets < vocabulary
                    store_gradient(grad, grad_row, grad_uncond_row, offsets, inside, guidance, inverse_temperature)
                else:
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
                        lse,
                        grad_log_prob,
                        None,
                        None,
                        TILE,
                    )
        else:
            tl.store(log_probs + i, 0.0)
            for term in tl.static_range(5):
                tl.store(terms + term * term_stride + i, 0.0)
            if (grad_logits is not None) or (grad_uncond is not None):
                zeros = tl.zeros((TILE,), tl.float32)
                for start in range(0, vocabulary, TILE):
                    columns = start + offsets
                    inside = columns < vocabulary
                    store_gradient(zeros, grad_row, grad_uncond_row, columns, inside, guidance, inverse_temperature)


@triton.jit(do_not_specialize=["row_count", "term_stride"], do_not_specialize_on_alignment=["mask", "terms"])
def summary_kernel(
    terms, mask, loss_out, entropy_out, kl_out, bounded_out, ratio_out, row_count, term_stride, TILE: tl.constexpr
):
    """Sums of the terms in a fixed order: one program."""
    offsets = tl.arange(0, TILE)
    loss = tl.zeros((TILE,), tl.float32)
    entropy = tl.zeros((TILE,), tl.float32)
    kl = tl.zeros((TILE,), tl.float32)
    bounded = tl.zeros((TILE,), tl.float32)
    counted = tl.zeros((TILE,), tl.int32)
    ratio = tl.zeros((TILE,), tl.float32)
    for start in range(0, row_count, TILE):
        i = start + offsets
        inside = i < row_count
        loss += tl.load(terms + i, mask=inside, other=0.0)
        entropy += tl.load(terms + term_stride + i, mask=inside, other=0.0)
        kl += tl.load(terms + 2 * term_stride + i, mask=inside, other=0.0)
        bounded += tl.load(terms + 3 * term_stride + i, mask=inside, other=0.0)
        here = tl.load(terms + 4 * term_stride + i, mask=inside, other=0.0)
        # A NaN wins, as in torch's max.
        ratio = tl.where((here > ratio) | (here != here), here, ratio)
        if mask is not None:
            inside = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
        counted += inside.to(tl.int32)
    count = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
    not_a_number = tl.sum((ratio != ratio).to(tl.int32), 0) > 0
    tl.store(loss_out, tl.sum(loss, 0))
    tl.store(entropy_out, tl.sum(entropy, 0) / count)
    tl.store(kl_out, tl.sum(kl, 0) / count)
    tl.store(bounded_out, tl.sum(bounded, 0) / count)
    tl.store(ratio_out, tl.where(not_a_number, float("nan"), tl.max(ratio, 0)))


@triton.jit(
    do_not_specialize=["row_count"],
    do_not_specialize_on_alignment=["mask", "advantages", "importance_ratios", "row_advantages", "row_weights"],
)
def row_table_kernel(
    cu_seqlens,
    mask,
    advantages,
    importance_ratios,
    normalizer,
    row_advantages,
    row_weights,
    row_count,
    host_normalizer,
    PER_ROW: tl.constexpr,
    RATIO_PER_ROW: tl.constexpr,
    MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each row's advantage and share in the loss; one program per sequence."""
    sequence = tl.program_id(0)
    # Nobody has looked at the boundaries; wrong ones must not reach other memory.
    start = tl.maximum(tl.load(cu_seqlens + sequence), 0)
    stop = tl.minimum(tl.load(cu_seqlens + sequence + 1), row_count)
    offsets = tl.arange(0, TILE)
    length = (stop - start).to(tl.float32)
    if MEAN:  # noqa: SIM102, both are known when it is compiled
        if mask is not None:
            kept = tl.zeros((TILE,), tl.int32)
            for first in range(start, stop, TILE):
                i = first + offsets
                kept += (tl.load(mask + i, mask=i < stop, other=0) != 0).to(tl.int32)
            length = tl.sum(kept, 0).to(tl.float32)
    denominator = host_normalizer
    if normalizer is not None:
        denominator = tl.load(normalizer)
    if MEAN:
        denominator = denominator * tl.maximum(length, 1.0)
    for first in range(start, stop, TILE):
        i = first + offsets
        inside = i < stop
        if PER_ROW:
            advantage = tl.load(advantages + i, mask=inside, other=0.0).to(tl.float32)
        else:
            advantage = tl.load(advantages + sequence).to(tl.float32) + tl.zeros((TILE,), tl.float32)
        if importance_ratios is not None:
            if RATIO_PER_ROW:
                advantage *= tl.load(importance_ratios + i, mask=inside, other=0.0).to(tl.float32)
            else:
                advantage *= tl.load(importance_ratios + sequence).to(tl.float32)
        tl.store(row_advantages + i, advantage, mask=inside)
        tl.store(row_weights + i, 1.0 / denominator + tl.zeros((TILE,), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["count"])
def scale_kernel(values, scale, peak, out, count, IN_PLACE: tl.constexpr, TILE: tl.constexpr):
    """out = values * scale * peak; in place, a factor of 1 costs no traffic."""
    factor = tl.load(scale).to(tl.float32)
    if peak is not None:
        factor *= tl.load(peak)
    if IN_PLACE:
        count = tl.where(factor == 1.0, 0, count)
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < count
    scaled = tl.load(values + i, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + i, scaled.to(out.dtype.element_ty), mask=inside)


def loss_rows(
    logits,
    batch,
    settings,
    log_probs,
    terms,
    grad_logits,
    *,
    mask=None,
    target=None,
    uncond=None,
    guidance=1.0,
    grad_uncond=None,
    peak=None,
):
    """Log-probabilities (M,), loss terms (5, M) and, unless both are None, the gradients of the logits.

    logits (M, V), any strides; ``grad_logits`` (M, V) may be ``logits`` itself; ``grad_uncond`` (M, V) is that of
    ``uncond``. ``batch`` has the M rows; masked ones get zeros. ``peak``, a one-element tensor, divides the gradients.
    """
    count, vocabulary = logits.shape
    if count == 0:
        return
    whole = vocabulary <= WHOLE_ROW
    tile, warps = tile_and_warps(vocabulary, WHOLE_ROW if whole else None)
    clip = settings.eps_low is not None
    cispo = settings.loss_type == "cispo"
    grad_weights = batch.weights if peak is None else batch.weights / peak
    grpo_rows_kernel[(program_count(count, logits.device, 4 if whole else 1),)](
        logits,
        uncond,
        mask,
        batch.token_ids,
        target,
        batch.advantages,
        batch.weights,
        grad_weights,
        batch.old_log_probs,
        batch.ref_log_probs,
        log_probs,
        terms,
        grad_logits,
        grad_uncond,
        count,
        terms.stride(0),
        vocabulary,
        *logits.stride(),
        *strides(uncond),
        strides(grad_logits)[0],
        strides(grad_uncond)[0],
        guidance,
        1.0 / settings.temperature,
        settings.beta,
        1.0 - settings.eps_low if clip else 0.0,
        1.0 + settings.eps_high if clip or cispo else 0.0,
        0.0 if settings.delta is None else settings.delta,
        CISPO=cispo,
        CLIP=clip and not cispo,
        DELTA=settings.delta is not None,
        WHOLE=whole,
        TILE=tile,
        num_warps=warps,
    )


def summarize_terms(terms, mask=None):
    """Scalars, float32: loss, mean entropy, mean k3, clip fraction, largest ratio, from terms (5, M)."""
    scalars = [torch.empty((), dtype=torch.float32, device=terms.device) for _ in range(TERMS)]
    summary_kernel[(1,)](terms, mask, *scalars, terms.shape[1], terms.stride(0), TILE=1024, num_warps=8)
    return scalars


def row_table(cu_seqlens, row_count, mask, advantages, importance_ratios, normalizer, *, mean):
    """(advantages, weights), each (N,) float32, of every row.

    advantages and importance_ratios (S,) or (N,); normalizer a number or a one-element tensor on the device; ``mean``
    divides by each sequence's kept rows as well.
    """
    device = cu_seqlens.device
    sequences = cu_seqlens.shape[0] - 1
    row_advantages, row_weights = (torch.zeros(row_count, dtype=torch.float32, device=device) for _ in range(2))
    if row_count == 0:
        return row_advantages, row_weights
    on_device = isinstance(normalizer, torch.Tensor)
    row_table_kernel[(sequences,)](
        cu_seqlens,
        mask,
        advantages,
        importance_ratios,
        normalizer if on_device else None,
        row_advantages,
        row_weights,
        row_count,
        1.0 if on_device else float(normalizer),
        PER_ROW=advantages.shape[0] != sequences,
        RATIO_PER_ROW=importance_ratios is not None and importance_ratios.shape[0] != sequences,
        MEAN=mean,
        TILE=1024,
    )
    return row_advantages, row_weights


def scale_gradient(values, scale, dtype, peak=None):
    """``values * scale * peak`` as ``dtype``; in place where the type stays, at no cost if the factor is 1.

    values contiguous; scale and peak one-element tensors on their device, which the host never reads.
    """
    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    count = values.numel()
    if count:
        tile = 4096
        scale_kernel[(triton.cdiv(count, tile),)](
            values, scale, peak, out, count, IN_PLACE=out is values, TILE=tile, num_warps=8
        )
    return out
