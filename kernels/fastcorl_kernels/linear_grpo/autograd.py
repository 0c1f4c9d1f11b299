"""Chunked ``linear_grpo_loss``: the forward computes the gradients, the backward only scales them.

With a ratio per token a row's gradient needs nothing but the row, so each chunk's logits are computed once (3 matrix
products, 2 for a frozen head). With a ratio per sequence all log-probabilities come first, and the logits are computed
a second time for the gradients (4 and 3).
"""

import torch
from torch.autograd.function import once_differentiable

from fastcorl_kernels.chunking import ChunkedHead, HeadGradients, entropy_rows, logit_gradient, needed_gradients
from fastcorl_kernels.grpo.objective import GRPOLoss, log_prob_gradient, summarize
from fastcorl_kernels.linear_log_softmax.autograd import chunked_backward, chunked_log_probs


def single_pass(head, batch, settings, needs):
    """Log-probabilities (M,), entropies (M,) and gradients, for ratios per token."""
    gradients = HeadGradients(head, needs)
    log_probs = torch.empty(head.count, dtype=head.dtype, device=head.hidden.device)
    entropy = torch.empty_like(log_probs)
    for start, stop in head.chunks():
        rows, chunk = head.hidden_rows(start, stop), batch.span(start, stop)
        log_p, log_prob = head.log_softmax(rows, chunk.token_ids)
        entropy[start:stop], p = entropy_rows(log_p)
        log_probs[start:stop] = log_prob
        upstream = log_prob_gradient(log_prob, chunk, settings)
        gradients.add(start, stop, rows, logit_gradient(log_p, p, chunk.token_ids, upstream, head.temperature))
    return log_probs, entropy, gradients


def two_passes(head, batch, settings, needs):
    """The same for ratios per sequence, which no chunk can know before all of the sequence's rows are in."""
    log_probs, entropy = chunked_log_probs(head, batch.token_ids, want_entropy=True)
    upstream = log_prob_gradient(log_probs, batch, settings)
    return log_probs, entropy, chunked_backward(head, batch.token_ids, needs, upstream)


class LinearGRPOLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, batch, settings, needs):
        head = ChunkedHead(hidden, weight, bias, settings.temperature, batch.rows)
        passes = two_passes if settings.importance == "sequence" else single_pass
        log_probs, entropy, gradients = passes(head, batch, settings, needs)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        result = summarize(log_probs, entropy, batch, settings)
        metrics = (result.log_probs, result.entropy, result.kl, result.clip_fraction, result.ratio_max)
        ctx.mark_non_differentiable(*(metric for metric in metrics if metric is not None))
        return result.loss, *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grads = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None


def linear_grpo_loss_chunked(hidden, weight, bias, batch, settings):
    """See ``linear_grpo_loss``; ``batch`` from ``prepare_batch``."""
    needs = needed_gradients(hidden, weight, bias)
    if any(needs):
        return GRPOLoss(*LinearGRPOLossFunction.apply(hidden, weight, bias, batch, settings, needs))
    with torch.no_grad():
        head = ChunkedHead(hidden, weight, bias, settings.temperature, batch.rows)
        log_probs, entropy = chunked_log_probs(head, batch.token_ids, want_entropy=True)
        return summarize(log_probs, entropy, batch, settings)
