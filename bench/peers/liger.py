"""Liger-Kernel: the Triton loss on logits, the chunked linear loss, and the scaled cross-entropy for Hopper."""

import pytest
import torch

from bench.peers.contestant import Contestant
from bench.peers.plain import objective
from bench.peers.settings import BETA, EPS, LOSS_TYPE


def _liger(module):
    return pytest.importorskip(f"liger_kernel.{module}", exc_type=ImportError)


def _needs_triton(tensor):
    if not tensor.is_cuda:
        pytest.skip("Liger's Triton kernels need a GPU")


def _padded(rows, values):
    """(N, ...) to (S, L + 1, ...): Liger wants the logits of the position after the last token, which it ignores."""
    values = rows.by_sequence(values.detach())
    return torch.cat([values, values[:, -1:]], dim=1)


def _mask(rows):
    return None if rows.mask is None else rows.by_sequence(rows.mask).contiguous()


def _unpadded(outputs):
    """The gradient of padded leaves, as that of the rows; other leaves' gradients pass."""
    output, padded, *others = outputs
    return output, padded[:, :-1].flatten(0, 1), *others


def _triton_loss(rows, inplace):
    function = _liger("transformers.grpo_loss").triton_grpo_loss
    old, ref, token_ids = (rows.by_sequence(v) for v in (rows.old_log_probs, rows.ref_log_probs, rows.token_ids))
    options = dict(temperature=1.0, beta=BETA, eps_low=EPS, eps_high=EPS, loss_type=LOSS_TYPE, reduce=True)
    mask = _mask(rows)
    return lambda logits: function(logits, old, ref, token_ids, rows.advantages, mask, inplace=inplace, **options)[0]


def grpo(problem):
    _needs_triton(problem.logits)
    logits = _padded(problem.rows, problem.logits).requires_grad_()
    return Contestant(_triton_loss(problem.rows, inplace=False), (logits,), read=_unpadded)


def grpo_in_place(problem):
    """Overwrites its logits with their gradient, so they are written anew before each call."""
    _needs_triton(problem.logits)
    pristine = _padded(problem.rows, problem.logits)
    logits = pristine.clone().requires_grad_()
    return Contestant(
        _triton_loss(problem.rows, inplace=True),
        (logits,),
        read=_unpadded,
        before=lambda: logits.data.copy_(pristine),
    )


def log_softmax(problem):
    """Forward only: Liger's function has no gradient."""
    _needs_triton(problem.logits)
    function = _liger("ops.grpo_loss").fused_selective_log_softmax
    token_ids = problem.rows.by_sequence(problem.rows.token_ids)
    logits = _padded(problem.rows, problem.logits)
    return Contestant(
        lambda logits: function(logits, token_ids, temperature=1.0),
        (logits,),
        read=lambda outputs: (outputs[0].flatten(),),
    )


def matmul_and_grpo(problem):
    """The head as a matrix product, and Liger's Triton loss on its logits, in place."""
    _needs_triton(problem.hidden)
    loss = _triton_loss(problem.rows, inplace=True)
    hidden = _padded(problem.rows, problem.hidden).requires_grad_()
    return Contestant(lambda h, w: loss(h @ w.T), (hidden, problem.weight), read=_unpadded)


def chunked_grpo(problem):
    torch.compiler.reset()  # it compiles its loss for each shape
    rows = problem.rows
    module = _liger("chunked_loss").LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_low=EPS, epsilon_high=EPS, loss_type=LOSS_TYPE
    )
    token_ids, old, ref = (rows.by_sequence(v) for v in (rows.token_ids, rows.old_log_probs, rows.ref_log_probs))
    mask = torch.ones_like(token_ids) if rows.mask is None else _mask(rows).long()

    def loss(hidden, weight):
        hidden = rows.by_sequence(hidden)
        return module(
            hidden, weight, token_ids, mask, rows.advantages, ref_per_token_logps=ref, old_per_token_logps=old
        )[0]

    return Contestant(loss, problem.leaves)


def _scaled_cross_entropy(problem):
    hidden = problem.hidden
    if not hidden.is_cuda or torch.cuda.get_device_capability() != (9, 0) or hidden.dtype != torch.bfloat16:
        pytest.skip("Liger's scaled cross-entropy kernel needs bfloat16 on a GPU of compute capability 9.0")
    _liger("ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    function = _liger("ops.fused_linear_scaled_cross_entropy").LigerFusedLinearScaledCrossEntropyFunction
    rows = problem.rows
    target = rows.token_ids if rows.mask is None else rows.token_ids.masked_fill(~rows.mask, -100)
    return lambda hidden, weight: -function.apply(hidden, weight, target)


def scaled_cross_entropy(problem):
    return Contestant(_scaled_cross_entropy(problem), problem.leaves)


def scaled_cross_entropy_grpo(problem):
    log_probs = _scaled_cross_entropy(problem)
    return Contestant(lambda hidden, weight: objective(log_probs(hidden, weight), problem.rows), problem.leaves)
