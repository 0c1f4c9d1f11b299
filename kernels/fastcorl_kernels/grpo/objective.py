"""The GRPO objective on the log-probabilities of the rows that count: one home for the maths of every loss.

All branches select; none multiplies by 0. A ratio may be infinite, and 0 * inf would carry a NaN into rows that the
clip, or an advantage of 0, had left out. For the same reason ``exp`` only sees the log-ratios whose gradient is wanted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class GRPOLoss:
    """What a GRPO loss returns. All but ``loss`` are detached; means are over the rows that count, 0 if there is none.

    Attributes:
        loss: scalar, differentiable.
        log_probs: (N,), the policy's, at the training temperature; 0 on masked rows.
        entropy: mean entropy of the policy.
        kl: mean k3 estimate of KL(policy || reference), or None without ``ref_log_probs``.
        clip_fraction: share of rows of non-zero advantage whose ratio the clip, the cap or ``delta`` replaced.
        ratio_max: the largest ratio, before clipping.
    """

    loss: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None
    clip_fraction: torch.Tensor
    ratio_max: torch.Tensor


class TokenTerms(NamedTuple):
    """Per row (M,): the loss before its weight, k3 or None, the ratio, and whether a bound replaced the ratio."""

    loss: torch.Tensor
    kl: torch.Tensor | None
    ratio: torch.Tensor
    bounded: torch.Tensor


class SegmentMean(torch.autograd.Function):
    """Each row's value becomes the mean over its sequence: (M,) to (M,).

    A symmetric projection, so the backward is the forward. ``segment_reduce`` adds in a fixed order where scatter and
    ``index_add`` use atomics; ``unsafe`` leaves out checks that make the host wait.
    """

    @staticmethod
    def forward(ctx, values, lengths, sequence_ids):
        ctx.save_for_backward(lengths, sequence_ids)
        if values.numel() == 0:  # which segment_reduce refuses
            return values.clone()
        sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
        return (sums / lengths.clamp(min=1))[sequence_ids]

    @staticmethod
    def backward(ctx, grad):
        return SegmentMean.apply(grad.contiguous(), *ctx.saved_tensors), None, None


def token_terms(log_probs, batch, settings):
    """The per-row terms of the loss at ``log_probs`` (M,)."""
    old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
    log_ratio = _difference(log_probs, old)
    if settings.importance == "sequence":
        log_ratio = SegmentMean.apply(log_ratio, batch.lengths, batch.sequence_ids)
    ratio = log_ratio.detach().exp()
    if settings.loss_type == "cispo":
        loss, bounded = _cispo(log_probs, ratio, batch.advantages, settings)
    else:
        loss, bounded = _clipped(log_ratio, ratio, batch.advantages, settings)
    kl = None
    if batch.ref_log_probs is not None:
        kl = _k3(log_probs, batch.ref_log_probs)
        if settings.beta != 0.0:
            loss = loss + settings.beta * kl
    return TokenTerms(loss, None if kl is None else kl.detach(), ratio, bounded)


def log_prob_gradient(log_probs, batch, settings):
    """Gradient (M,) of the loss with respect to ``log_probs``."""
    with torch.enable_grad():
        leaf = log_probs.detach().requires_grad_()
        loss = (batch.weights * token_terms(leaf, batch, settings).loss).sum()
        return torch.autograd.grad(loss, leaf)[0]


def summarize(log_probs, entropy, batch, settings):
    """``GRPOLoss`` from ``log_probs`` (M,), through which the loss stays differentiable, and ``entropy`` (M,)."""
    terms = token_terms(log_probs, batch, settings)
    return GRPOLoss(
        loss=(batch.weights * terms.loss).sum(),
        log_probs=batch.scatter(log_probs.detach()),
        entropy=_mean(entropy.detach()),
        kl=None if terms.kl is None else _mean(terms.kl),
        clip_fraction=_mean(terms.bounded.to(log_probs.dtype)),
        ratio_max=terms.ratio.max() if terms.ratio.numel() else terms.ratio.new_zeros(()),
    )


def _mean(values):
    return values.sum() / max(values.numel(), 1)


def _difference(a, b):
    """``a - b``, with 0 where both are -inf."""
    same = a.detach().isneginf() & b.isneginf()
    return a.masked_fill(same, 0.0) - b.masked_fill(same, 0.0)


def _k3(log_probs, ref_log_probs):
    gap = -_difference(log_probs, ref_log_probs)
    return torch.expm1(gap) - gap


def _clipped(log_ratio, ratio, advantages, settings):
    """-min(min(ratio, delta) * A, clip(ratio) * A), as -(the ratio that min picks) * A."""
    picked = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    if settings.eps_low is not None:
        clipped = ratio.clamp(1.0 - settings.eps_low, 1.0 + settings.eps_high)
        lower, upper = torch.minimum(picked, clipped), torch.maximum(picked, clipped)
        picked = torch.where(advantages > 0, lower, upper)
    weighs = advantages != 0
    free = (picked == ratio) & weighs
    bounded = (picked != ratio) & weighs & ~ratio.isnan()
    picked = picked.masked_fill(~weighs & picked.isinf(), 0.0)
    moving = torch.where(free, log_ratio, 0.0).exp()
    return -torch.where(free, moving, picked) * advantages, bounded


def _cispo(log_probs, ratio, advantages, settings):
    """-min(ratio, 1 + eps_high).detach() * A * log_prob."""
    capped = ratio.clamp(max=1.0 + settings.eps_high)
    factor = capped * advantages
    return -factor * torch.where(factor == 0, 0.0, log_probs), (capped < ratio) & (advantages != 0)
