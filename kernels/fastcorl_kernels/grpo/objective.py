"""The GRPO objective on the log-probabilities of the rows that count: one home for the maths of every loss.

All branches select; none multiplies by 0. A ratio may be infinite, and 0 * inf would carry a NaN into rows that the
clip, or an advantage of 0, had left out. The derivatives are written out, next to the values that they share.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


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
    """Per row (M,), without a graph.

    Attributes:
        log_probs: the policy's.
        loss: before the row's weight.
        slope: derivative of the loss without KL by the log-ratio; by the log-probability for ``"cispo"``.
        ratio: before clipping.
        bounded: whether a bound replaced the ratio.
        kl, kl_slope: k3 and its derivative by the log-probability; None without a reference.
    """

    log_probs: torch.Tensor
    loss: torch.Tensor
    slope: torch.Tensor
    ratio: torch.Tensor
    bounded: torch.Tensor
    kl: torch.Tensor | None
    kl_slope: torch.Tensor | None


def token_terms(log_probs, batch, settings):
    """The terms of the loss at ``log_probs`` (M,)."""
    log_probs = log_probs.detach()
    log_ratio = _difference(log_probs, log_probs if batch.old_log_probs is None else batch.old_log_probs)
    if settings.importance == "sequence":
        log_ratio = segment_mean(log_ratio, batch)
    ratio = log_ratio.exp_()
    if settings.loss_type == "cispo":
        loss, slope, bounded = _cispo(log_probs, ratio, batch.advantages, settings)
    else:
        loss, slope, bounded = _clipped(ratio, batch.advantages, settings)
    kl = kl_slope = None
    if batch.ref_log_probs is not None:
        gap = _difference(batch.ref_log_probs, log_probs)
        growth = torch.expm1(gap)
        kl, kl_slope = growth - gap, -growth
        if settings.beta != 0.0:
            loss = loss + settings.beta * kl
    return TokenTerms(log_probs, loss, slope, ratio, bounded, kl, kl_slope)


def log_prob_gradient(terms, upstream, batch, settings):
    """Gradient (M,) of ``(upstream * terms.loss).sum()`` with respect to the log-probabilities."""
    grad = upstream * terms.slope
    if settings.loss_type != "cispo":
        if settings.importance == "sequence":
            grad = segment_mean(grad, batch)  # a symmetric projection: its derivative is itself
        # Where old and new are -inf their difference is 0 by definition, and constant; elsewhere the ratio is 0.
        grad.masked_fill_(terms.log_probs.isneginf(), 0.0)
    return grad if settings.beta == 0.0 else grad + settings.beta * upstream * terms.kl_slope


def summarize(terms, entropy, batch):
    """``GRPOLoss`` without a graph from the terms and the ``entropy`` (M,) of all rows of ``batch``."""
    count = max(entropy.numel(), 1)
    return GRPOLoss(
        loss=(batch.weights * terms.loss).sum(),
        log_probs=batch.scatter(terms.log_probs),
        entropy=entropy.sum() / count,
        kl=None if terms.kl is None else terms.kl.sum() / count,
        clip_fraction=terms.bounded.sum(dtype=entropy.dtype) / count,
        ratio_max=terms.ratio.max() if terms.ratio.numel() else terms.ratio.new_zeros(()),
    )


class TokenLosses(torch.autograd.Function):
    """``token_terms(...).loss``, differentiable in the log-probabilities."""

    @staticmethod
    def forward(ctx, log_probs, batch, settings):
        terms = token_terms(log_probs, batch, settings)
        # A context that kept its own output would be a cycle.
        ctx.terms, ctx.batch, ctx.settings = terms._replace(loss=None), batch, settings
        return terms.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        return log_prob_gradient(ctx.terms, grad_losses, ctx.batch, ctx.settings), None, None


def segment_mean(values, batch):
    """Each row's value becomes the mean over its sequence: (M,) to (M,).

    ``segment_reduce`` adds in a fixed order where scatter and ``index_add`` use atomics; ``unsafe`` leaves out checks
    that make the host wait.
    """
    if values.numel() == 0:  # which segment_reduce refuses
        return values
    sums = torch.segment_reduce(values, "sum", lengths=batch.lengths, axis=0, initial=0.0, unsafe=True)
    return (sums / batch.lengths.clamp(min=1)).index_select(0, batch.sequence_ids)


def _difference(a, b):
    """``a - b``, with 0 where they are equal: also where both are -inf."""
    return (a - b).masked_fill_(a == b, 0.0)


def _clipped(ratio, advantages, settings):
    """-min(min(ratio, delta) * A, clip(ratio) * A), as -(the ratio that min picks) * A."""
    picked = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    if settings.eps_low is not None:
        clipped = ratio.clamp(1.0 - settings.eps_low, 1.0 + settings.eps_high)
        lower, upper = torch.minimum(picked, clipped), torch.maximum(picked, clipped)
        picked = torch.where(advantages > 0, lower, upper)
    weighs = advantages != 0
    picked = torch.where(weighs, picked, ratio.clamp(max=1.0))  # inf * 0 would be NaN
    free = (picked == ratio) & weighs
    loss = -picked * advantages
    return loss, torch.where(free, loss, 0.0), (weighs ^ free) & ~ratio.isnan()


def _cispo(log_probs, ratio, advantages, settings):
    """-min(ratio, 1 + eps_high).detach() * A * log_prob."""
    capped = ratio.clamp(max=1.0 + settings.eps_high)
    slope = -capped * advantages
    return slope * torch.where(slope == 0, 0.0, log_probs), slope, (capped < ratio) & (advantages != 0)
