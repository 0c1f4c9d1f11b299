"""One autograd function for the GRPO losses from any source of logits.

The forward computes the gradients, the backward only scales them by the loss's upstream gradient. They are scaled in
place, so a second backward through the same graph computes them anew.
"""

import torch

from fastcorl_kernels.grpo.objective import GRPOLoss
from fastcorl_kernels.log_softmax.autograd import first_derivative_only, needed_gradients, op_context


class GRPOLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, batch, settings, needs, *operands):
        ctx.source, ctx.batch, ctx.settings, ctx.needs = source, batch, settings, needs
        with source.bound(operands):
            result, ctx.gradients, ctx.peak = source.grpo(batch, settings, needs)
        ctx.save_for_backward(*operands)
        metrics = (result.log_probs, result.entropy, result.kl, result.clip_fraction, result.ratio_max)
        ctx.mark_non_differentiable(*(metric for metric in metrics if metric is not None))
        return result.loss, *metrics

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_loss, *_):
        operands, source = ctx.saved_tensors, ctx.source
        gradients, ctx.gradients = ctx.gradients, None
        with op_context(ctx.batch.token_ids):
            if gradients is None:
                with source.bound(operands):
                    _, gradients, ctx.peak = source.grpo(ctx.batch, ctx.settings, ctx.needs)
            grads = [
                None if gradient is None else source.scale(gradient, grad_loss, operand.dtype, ctx.peak)
                for gradient, operand in zip(gradients, operands, strict=True)
            ]
        return None, None, None, None, *grads


def differentiable_grpo_loss(source, batch, settings):
    """``GRPOLoss`` of ``source``."""
    operands = source.take_given()
    needs = needed_gradients(*operands)
    with op_context(batch.token_ids):
        if any(needs):
            return GRPOLoss(*GRPOLossFunction.apply(source, batch, settings, needs, *operands))
        with source.bound(operands):
            return source.grpo(batch, settings, needs)[0]
