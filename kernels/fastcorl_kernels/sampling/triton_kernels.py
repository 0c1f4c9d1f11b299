"""Triton sampling: one program per row, which reads its logits once, and a fixed number of times more to truncate.

Lanes keep their own maximum, sum and winner until the end of the row, so that tiles do not wait for a reduction.
"""

import torch
import triton
import triton.language as tl

from fastcorl_kernels.log_softmax.triton_kernels import strides
from fastcorl_kernels.log_softmax.triton_rows import guided, load_target

MAX_TILE = 4096
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: differences to -inf stay numbers


@triton.jit
def mix(x):
    """A bijection of 32-bit integers with good avalanche (Wellons' lowbias32), on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_key(seed, step):
    # `mix` maps 0 to 0; the offset keeps the plainest key, seed 0 at step 0, away from it.
    return mix(mix(seed.to(tl.uint32) + 0x9E3779B9) + step.to(tl.uint32))


@triton.jit
def gumbel(key, columns):
    """Float32 Gumbel noise of the tokens ``columns``."""
    bits = mix(mix(key + columns.to(tl.uint32)) ^ key)
    # High noise comes from a small uniform, where float32 is fine-grained; 1 would give infinite noise.
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    # log1p(-uniform): log's error is that of the rounded difference, which the factor takes back.
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, tl.log(rest) * (uniform / (rest - 1.0)))
    return -tl.log(exponential)


@triton.jit
def load_logits(row, uncond_row, columns, vocabulary, stride, uncond_stride, guidance):
    """(guided, conditional) logits of one tile, float32; -inf outside of the row."""
    inside = columns < vocabulary
    c = tl.load(row + columns.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    z = c
    if uncond_row is not None:
        u = tl.load(uncond_row + columns.to(tl.int64) * uncond_stride, mask=inside, other=0.0).to(tl.float32)
        z = guided(c, u, inside, guidance)
    return z, c


@triton.jit
def merge(m, s, x):
    """Each lane's maximum and sum of exp(x - maximum), with one more x."""
    e = tl.exp(-tl.abs(x - m))
    return tl.maximum(m, x), tl.where(x > m, s * e + 1.0, s + e)


@triton.jit
def log_prob(x, m, s):
    """log softmax at the logit ``x``, from the lanes' maxima and sums."""
    highest = tl.max(m, 0)
    # The difference first: it is exact where the logits are far from 0.
    return (x - highest) - tl.log(tl.sum(s * tl.exp(m - highest), 0))


@triton.jit
def ordered(x):
    """A float32 as an integer in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def from_ordered(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def highest_logit(row, uncond_row, vocabulary, stride, uncond_stride, guidance, TILE: tl.constexpr):
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        z, _ = load_logits(row, uncond_row, columns, vocabulary, stride, uncond_stride, guidance)
        highest = tl.maximum(highest, z)
    return tl.max(highest, 0)


@triton.jit
def weight_from(
    lowest,
    highest,
    row,
    uncond_row,
    vocabulary,
    stride,
    uncond_stride,
    guidance,
    inverse_temperature,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The number of tokens with logits of at least ``lowest``, or the sum of their exp((z - highest) / temperature)."""
    weights = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        z, _ = load_logits(row, uncond_row, columns, vocabulary, stride, uncond_stride, guidance)
        weight = 1.0
        if BY_MASS:
            weight = tl.exp((z - highest) * inverse_temperature)
        weights += tl.where(z >= lowest, weight, 0.0)
    return tl.sum(weights, 0)


@triton.jit
def lowest_kept(
    wanted,
    lowest,
    highest,
    row,
    uncond_row,
    vocabulary,
    stride,
    uncond_stride,
    guidance,
    inverse_temperature,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The highest threshold, of at least ``lowest``, above which the weight is still ``wanted``.

    It is one of the logits, since the weight changes only there.
    """
    low = ordered(lowest)
    beyond = ordered(highest) + 1
    for _ in range(32):
        middle = low + (beyond - low) // 2
        weight = weight_from(
            from_ordered(middle),
            highest,
            row,
            uncond_row,
            vocabulary,
            stride,
            uncond_stride,
            guidance,
            inverse_temperature,
            BY_MASS,
            TILE,
        )
        # The most likely token is kept whatever it weighs.
        enough = weight >= wanted
        low = tl.where(enough, middle, low)
        beyond = tl.where(enough, beyond, middle)
    return from_ordered(low)


@triton.jit(
    do_not_specialize=["step", "copies"],
    do_not_specialize_on_alignment=["seeds", "steps", "tokens", "log_probs", "cond_log_probs", "copied"],
)
def sample_kernel(
    logits,
    uncond,
    seeds,
    steps,
    step,
    tokens,
    log_probs,
    cond_log_probs,
    copied,
    copies,
    vocabulary,
    row_stride,
    stride,
    uncond_row_stride,
    uncond_stride,
    seeds_stride,
    steps_stride,
    copied_row_stride,
    copied_stride,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    GREEDY: tl.constexpr,
    TRUNCATE: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * row_stride
    uncond_row = None
    if uncond is not None:
        uncond_row = uncond + place * uncond_row_stride
    if not GREEDY:
        if steps is not None:
            step = tl.load(steps + place * steps_stride)
        key = row_key(tl.load(seeds + place * seeds_stride), tl.cast(step, tl.int64))
    if TRUNCATE:
        highest = highest_logit(row, uncond_row, vocabulary, stride, uncond_stride, guidance, TILE)
        lowest = tl.full((), float("-inf"), tl.float32)
        if top_k is not None:
            lowest = lowest_kept(
                top_k,
                lowest,
                highest,
                row,
                uncond_row,
                vocabulary,
                stride,
                uncond_stride,
                guidance,
                inverse_temperature,
                False,
                TILE,
            )
        if top_p is not None:
            mass = weight_from(
                lowest,
                highest,
                row,
                uncond_row,
                vocabulary,
                stride,
                uncond_stride,
                guidance,
                inverse_temperature,
                True,
                TILE,
            )
            lowest = lowest_kept(
                top_p * mass,
                lowest,
                highest,
                row,
                uncond_row,
                vocabulary,
                stride,
                uncond_stride,
                guidance,
                inverse_temperature,
                True,
                TILE,
            )
    m = tl.full((TILE,), LOWEST, tl.float32)
    s = tl.zeros((TILE,), tl.float32)
    cond_m = m
    cond_s = s
    best = tl.full((TILE,), float("-inf"), tl.float32)
    winner = tl.arange(0, TILE)
    for start in tl.range(0, vocabulary, TILE, num_stages=3):  # loads run ahead of the arithmetic
        columns = start + tl.arange(0, TILE)
        z, c = load_logits(row, uncond_row, columns, vocabulary, stride, uncond_stride, guidance)
        x = z * inverse_temperature
        m, s = merge(m, s, x)
        if uncond is not None:
            cond_m, cond_s = merge(cond_m, cond_s, c * inverse_temperature)
        score = x
        if not GREEDY:
            score += gumbel(key, columns)
        if TRUNCATE:
            score = tl.where(z >= lowest, score, float("-inf"))
        better = score > best
        best = tl.where(better, score, best)
        winner = tl.where(better, columns, winner)
    # The lowest id of equals.
    token = tl.min(tl.where(best == tl.max(best, 0), winner, vocabulary), 0).to(tl.int64)
    tl.store(tokens + place, token)
    if copied is not None:
        for copy in range(copies):
            tl.store(copied + tl.cast(copy, tl.int64) * copied_row_stride + place * copied_stride, token)
    z = load_target(row, uncond_row, stride, uncond_stride, token, vocabulary, guidance)
    tl.store(log_probs + place, log_prob(z * inverse_temperature, m, s))
    if uncond is not None:
        c = load_target(row, None, stride, uncond_stride, token, vocabulary, guidance)
        tl.store(cond_log_probs + place, log_prob(c * inverse_temperature, cond_m, cond_s))


def sample_tokens_triton(logits, seeds, steps, uncond, guidance, temperature, top_k, top_p, tokens_out):
    """(tokens, log_probs, cond_log_probs), each (n,); see ``sample_tokens``."""
    count, vocabulary = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(count, dtype=torch.float32, device=logits.device)
    cond_log_probs = log_probs if uncond is None else torch.empty_like(log_probs)
    if count == 0:
        return tokens, log_probs, cond_log_probs
    copied = tokens_out[None] if tokens_out is not None and tokens_out.dim() == 1 else tokens_out
    per_row = isinstance(steps, torch.Tensor)
    tile = min(triton.next_power_of_2(vocabulary), MAX_TILE)
    sample_kernel[(count,)](
        logits,
        uncond,
        seeds,
        steps if per_row else None,
        0 if per_row else int(steps) & 0xFFFFFFFF,
        tokens,
        log_probs,
        cond_log_probs,
        copied,
        0 if copied is None else copied.shape[0],
        vocabulary,
        *logits.stride(),
        *strides(uncond),
        seeds.stride(0),
        steps.stride(0) if per_row else 0,
        *strides(copied),
        float(guidance),
        1.0 / (temperature or 1.0),
        top_k,
        top_p,
        GREEDY=temperature == 0,
        TRUNCATE=top_k is not None or top_p is not None,
        TILE=tile,
        num_warps=max(4, min(16, tile // 256)),
        enable_fp_fusion=False,  # guided logits are the same bits in every sweep, and those of torch
    )
    return tokens, log_probs, cond_log_probs
