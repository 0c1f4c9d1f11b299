"""The maths of ``objective.py`` for a ratio per token, once more for the row's Triton program."""

import triton
import triton.language as tl


@triton.jit
def difference(a, b):
    """a - b, with 0 where both are -inf."""
    return tl.where((a == float("-inf")) & (b == float("-inf")), 0.0, a - b)


@triton.jit
def k3_terms(gap):
    """k3 = expm1(gap) - gap, and expm1(gap); a series near 0, where the difference would lose every digit."""
    series = 1.0 + gap / 8.0 * (1.0 + gap / 9.0)
    series = 1.0 + gap / 6.0 * (1.0 + gap / 7.0 * series)
    series = 1.0 + gap / 4.0 * (1.0 + gap / 5.0 * series)
    small = 0.5 * gap * gap * (1.0 + gap / 3.0 * series)
    near = tl.abs(gap) < 0.5
    expm1 = tl.where(near, gap + small, tl.exp(gap) - 1.0)
    return tl.where(near, small, expm1 - gap), expm1


@triton.jit
def token_objective(
    log_prob, old, ref, advantage, beta, low, high, delta, CISPO: tl.constexpr, CLIP: tl.constexpr, DELTA: tl.constexpr
):
    """(loss, its derivative by log_prob, k3, bounded, ratio) of one row; selects, never multiplies by 0."""
    log_ratio = difference(log_prob, old)
    ratio = tl.exp(log_ratio)
    is_nan = ratio != ratio
    # Of two equal infinities the difference is 0 by definition, and constant.
    constant = (log_prob == float("-inf")) & (old == float("-inf"))
    slope = tl.where(constant, 0.0, 1.0)
    weighs = advantage != 0.0
    if CISPO:
        capped = tl.where(is_nan, ratio, tl.minimum(ratio, high))
        factor = capped * advantage
        silent = factor == 0.0
        loss = -factor * tl.where(silent, 0.0, log_prob)
        grad = tl.where(silent, 0.0, -factor)
        bounded = (capped < ratio) & weighs
    else:
        picked = ratio
        if DELTA:
            picked = tl.minimum(picked, delta)
        if CLIP:
            clipped = tl.minimum(tl.maximum(ratio, low), high)
            picked = tl.where(advantage > 0.0, tl.minimum(picked, clipped), tl.maximum(picked, clipped))
        picked = tl.where(is_nan, ratio, picked)
        free = (picked == ratio) & weighs
        bounded = (picked != ratio) & weighs & (is_nan == 0)
        picked = tl.where((weighs == 0) & (picked == float("inf")), 0.0, picked)
        loss = -picked * advantage
        grad = tl.where(free, loss, 0.0) * slope
    kl = 0.0
    if ref is not None:
        kl, expm1 = k3_terms(difference(ref, log_prob))
        loss = tl.where(beta != 0.0, loss + beta * kl, loss)
        grad = tl.where(beta != 0.0, grad - beta * expm1, grad)
    return loss, grad, kl, bounded, ratio
