"""One autograd function for log-probabilities from any source of logits; the backward sees the logits again."""

from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable


def needed_gradients(*operands):
    """Which of them want a gradient; none outside of grad mode."""
    return tuple(torch.is_grad_enabled() and operand.requires_grad for operand in operands)


@contextmanager
def op_context(tensor):
    """Without autocast, since the operations choose their own types, and on the tensor's device, as Triton needs."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


class LogProbsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, index, want_entropy, needs, *operands):
        ctx.source, ctx.needs = source, needs
        ctx.set_materialize_grads(False)
        state, log_probs, entropy = source.log_probs(index, want_entropy)
        # Saving the operands makes autograd notice if they change before the backward.
        ctx.save_for_backward(index, state, entropy, *operands)
        return (log_probs, entropy) if want_entropy else log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy=None):
        index, state, entropy, *operands = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(index.shape, dtype=ctx.source.dtype, device=index.device)
        with op_context(index):
            gradients = ctx.source.differentiate(state, index, grad_log_probs, ctx.needs, entropy, grad_entropy)
        grads = [None if g is None else g.to(o.dtype) for g, o in zip(gradients, operands, strict=True)]
        return None, None, None, None, *grads


def differentiable_log_probs(source, index, want_entropy):
    """log_probs (N,), or (log_probs, entropy), of ``source``."""
    operands = source.take_given()
    needs = needed_gradients(*operands)
    with op_context(index):
        if any(needs):
            return LogProbsFunction.apply(source, index, want_entropy, needs, *operands)
        _, log_probs, entropy = source.log_probs(index, want_entropy)
    return (log_probs, entropy) if want_entropy else log_probs
