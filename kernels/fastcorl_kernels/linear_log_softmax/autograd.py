"""Chunked ``linear_selective_log_softmax``: the backward recomputes the logits, so nothing of size (N, V) is kept."""

import torch
from torch.autograd.function import once_differentiable

from fastcorl_kernels.chunking import ChunkedHead, HeadGradients, entropy_rows, logit_gradient, needed_gradients


def chunked_log_probs(head, index, want_entropy):
    """Log-probabilities and, if wanted, entropies (else None) of the head's rows: (M,) each."""
    log_probs = torch.empty(head.count, dtype=head.dtype, device=head.hidden.device)
    entropy = torch.empty_like(log_probs) if want_entropy else None
    for start, stop in head.chunks():
        log_p, log_probs[start:stop] = head.log_softmax(head.hidden_rows(start, stop), index[start:stop])
        if want_entropy:
            entropy[start:stop] = entropy_rows(log_p)[0]
    return log_probs, entropy


def chunked_backward(head, index, needs, grad_log_probs, grad_entropy=None):
    """Gradients of hidden, weight and bias (None where not needed) from per-row upstream gradients (M,)."""
    gradients = HeadGradients(head, needs)
    for start, stop in head.chunks():
        rows, chosen = head.hidden_rows(start, stop), index[start:stop]
        log_p, _ = head.log_softmax(rows, chosen)
        entropy, p = entropy_rows(log_p)
        upstream = None if grad_entropy is None else grad_entropy[start:stop]
        grad_logits = logit_gradient(log_p, p, chosen, grad_log_probs[start:stop], head.temperature, entropy, upstream)
        gradients.add(start, stop, rows, grad_logits)
    return gradients


class LinearSelectiveLogSoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, index, temperature, return_entropy, needs):
        ctx.save_for_backward(hidden, weight, bias, index)
        ctx.temperature, ctx.return_entropy, ctx.needs = temperature, return_entropy, needs
        head = ChunkedHead(hidden, weight, bias, temperature)
        log_probs, entropy = chunked_log_probs(head, index, return_entropy)
        return (log_probs, entropy) if return_entropy else log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy=None):
        hidden, weight, bias, index = ctx.saved_tensors
        head = ChunkedHead(hidden, weight, bias, ctx.temperature)
        gradients = chunked_backward(head, index, ctx.needs, grad_log_probs, grad_entropy)
        grads = [
            None if gradient is None else gradient.to(operand.dtype)
            for gradient, operand in (
                (gradients.hidden, hidden),
                (gradients.weight, weight),
                (gradients.bias, bias),
            )
        ]
        return *grads, None, None, None, None


def linear_selective_log_softmax_chunked(hidden, weight, index, bias, temperature, return_entropy):
    """See ``linear_selective_log_softmax``."""
    index = index.long()
    needs = needed_gradients(hidden, weight, bias)
    if any(needs):
        return LinearSelectiveLogSoftmaxFunction.apply(hidden, weight, bias, index, temperature, return_entropy, needs)
    with torch.no_grad():
        log_probs, entropy = chunked_log_probs(ChunkedHead(hidden, weight, bias, temperature), index, return_entropy)
    return (log_probs, entropy) if return_entropy else log_probs
