"""One autograd function for log-probabilities from any source of logits; the backward sees the logits again."""

import functools
from contextlib import contextmanager, nullcontext

import torch


def needed_gradients(*operands):
    """Which of them want a gradient; none outside of grad mode."""
    return tuple(torch.is_grad_enabled() and operand.requires_grad for operand in operands)


def op_context(tensor):
    """Without autocast, since the operations choose their own types, and on the tensor's device, as Triton needs."""
    if tensor.is_cuda or torch.is_autocast_enabled(tensor.device.type):
        return _op_context(tensor)
    return nullcontext()


@contextmanager
def _op_context(tensor):
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def first_derivative_only(backward):
    """A backward whose result raises when it is differentiated, also where torch's own decorator stays silent.

    ``once_differentiable`` passes what depends on the saved tensors alone, such as the gradient of a plain loss.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads):
        creates_graph = torch.is_grad_enabled()
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not creates_graph:
            return results
        raises = torch._C._functions.DelayedError(b"fastcorl_kernels: only first derivatives exist", len(results))
        return raises(*(None if r is None else r.detach().requires_grad_() for r in results))

    return wrapped


class LogProbsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, index, want_entropy, needs, *operands):
        ctx.source, ctx.needs = source, needs
        ctx.set_materialize_grads(False)
        with source.bound(operands):
            state, log_probs, entropy = source.log_probs(index, want_entropy)
        # Saving the operands makes autograd notice if they change before the backward.
        ctx.save_for_backward(index, state, entropy, *operands)
        return (log_probs, entropy) if want_entropy else log_probs

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_log_probs, grad_entropy=None):
        index, state, entropy, *operands = ctx.saved_tensors
        source = ctx.source
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(index.shape, dtype=source.dtype, device=index.device)
        with op_context(index), source.bound(operands):
            gradients = source.differentiate(state, index, grad_log_probs, ctx.needs, entropy, grad_entropy)
        grads = [None if g is None else g.to(o.dtype) for g, o in zip(gradients, operands, strict=True)]
        return None, None, None, None, *grads


def differentiable_log_probs(source, index, want_entropy):
    """log_probs (N,), or (log_probs, entropy), of ``source``."""
    operands = source.take_given()
    needs = needed_gradients(*operands)
    with op_context(index):
        if any(needs):
            return LogProbsFunction.apply(source, index, want_entropy, needs, *operands)
        with source.bound(operands):
            _, log_probs, entropy = source.log_probs(index, want_entropy)
    return (log_probs, entropy) if want_entropy else log_probs
