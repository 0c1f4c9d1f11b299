"""TRL's log-probabilities and entropies on fastcorl_kernels, and a context in which its ``GRPOTrainer`` uses them.

with fastcorl_kernels.compat.trl.patched():
    trainer = GRPOTrainer(...)
    trainer.train()
"""

import inspect
from contextlib import contextmanager

import torch

import fastcorl_kernels
from fastcorl_kernels.checks import accumulator_dtype, check_number, require
from fastcorl_kernels.compat import liger


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """``trl.trainer.utils.selective_log_softmax``: log-probabilities at ``index``, differentiable in ``logits``.

    Args:
        logits: (..., V) floating tensor.
        index: (...), one per row, or (..., K); int32 or int64.
        temperature: positive number that divides the logits.
        row_mask: of the shape of ``index``; where it is 0 the result is 0, and a row without any other value is
            skipped: whatever lies on it changes nothing.

    Returns:
        Of the shape of ``index``, in float32 (float64 for float64 logits); TRL keeps half precision.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return _log_probs(logits, index, temperature, row_mask)[0]


def entropy_from_logits(logits, chunk_size=128):
    """``trl.trainer.utils.entropy_from_logits``: entropies (...) of ``logits`` (..., V), differentiable.

    ``chunk_size`` is accepted without effect. float32, or float64 for float64 logits.
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return _log_probs(logits, index, return_entropy=True)[1]


def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    """``trl.trainer.utils.selective_log_softmax_and_entropy``: both in one pass over the logits.

    Arguments as in ``selective_log_softmax``, ``index`` (...) only. Returns (log_probs, entropy), both (...), of the
    distribution at ``temperature``, and 0 where ``row_mask`` is.
    """
    log_probs, entropy = _log_probs(logits, index, temperature, row_mask, return_entropy=True)
    return log_probs, entropy if entropy_requires_grad else entropy.detach()


@contextmanager
def patched():
    """Inside this context, TRL's trainers compute log-probabilities and entropies with fastcorl_kernels.

    Replaces, in ``trl.trainer.utils`` and ``trl.trainer.grpo_trainer``, what the installed TRL has of:
    ``selective_log_softmax``, ``selective_log_softmax_and_entropy``, ``entropy_from_logits``, the function behind the
    fused language-model head, and Liger's loss. All are put back on exit. TRL keeps a head with soft-capped logits or
    with a weight that ZeRO-3 has partitioned, and one of which more than log-probabilities and entropies is asked.

    Raises:
        ImportError: without TRL.
    """
    from trl.trainer import grpo_trainer, utils

    swaps = [
        (module, name, getattr(module, name), replacement)
        for module in (utils, grpo_trainer)
        for name, replacement in REPLACEMENTS.items()
        if hasattr(module, name)
    ]
    head = getattr(utils, FUSED_HEAD, None)
    if head is not None and _parameters(head.forward) == _parameters(FusedHead.apply):
        swaps.append((utils, FUSED_HEAD, head, FusedHead(head)))
    try:
        for module, name, _, replacement in swaps:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original, _ in swaps:
            setattr(module, name, original)


def _parameters(method):
    """The names after ``ctx`` or ``self``: other versions of TRL call their fused head with other arguments."""
    return list(inspect.signature(method).parameters)[1:]


FUSED_HEAD = "_ChunkedLogProbFunction"
REPLACEMENTS = {
    "selective_log_softmax": selective_log_softmax,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    "entropy_from_logits": entropy_from_logits,
    "LigerFusedLinearGRPOLoss": liger.LigerFusedLinearGRPOLoss,
}


class FusedHead:
    """Stands in for the autograd function behind TRL's fused language-model head, which calls its ``apply``."""

    def __init__(self, original):
        self.original = original

    def apply(
        self,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=None,
    ):
        """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) to (log_probs, entropy or None, None...)."""
        offered = outputs is not None and set(outputs) <= {"log_probs", "entropy"}
        # TRL gathers a weight that ZeRO-3 has partitioned once more in its backward; ours would meet an empty one.
        partitioned = hasattr(weight, "ds_id")
        if not offered or partitioned or final_logit_softcapping is not None or logit_scale <= 0:
            arguments = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
            return self.original.apply(*arguments, *(() if outputs is None else (outputs,)))
        want_entropy = "entropy" in outputs
        hidden, weight, bias = liger.autocast_operands(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            result = fastcorl_kernels.linear_selective_log_softmax(
                hidden, weight, targets, bias=bias, temperature=temperature / logit_scale, return_entropy=want_entropy
            )
        log_probs, entropy = result if want_entropy else (result, None)
        return log_probs, entropy, None, None, None


def _log_probs(logits, index, temperature=1.0, row_mask=None, return_entropy=False):
    """Log-probabilities of the shape of ``index``, and entropies (...) or None."""
    require(isinstance(logits, torch.Tensor) and logits.dim() >= 1, "logits", "a tensor of shape (..., V)", logits)
    lead = logits.shape[:-1]
    fits = isinstance(index, torch.Tensor) and index.shape[: len(lead)] == lead and index.dim() - len(lead) in (0, 1)
    require(fits, "index", f"an integer tensor of shape {(*lead,)} or {(*lead, 'K')}", index)
    check_number(temperature, "temperature", exclusive=True)
    shape = (lead.numel(), 1 if index.dim() == len(lead) else index.shape[-1])
    rows, chosen = logits.reshape(shape[0], logits.shape[-1]), index.reshape(shape)
    if row_mask is None:
        values, entropy = _rows_log_probs(rows, chosen, temperature, return_entropy)
    else:
        fits = isinstance(row_mask, torch.Tensor) and row_mask.shape == index.shape
        require(fits, "row_mask", f"a tensor of shape {(*index.shape,)}", row_mask)
        wanted = row_mask.reshape(shape) != 0
        kept = wanted.any(dim=1).nonzero().squeeze(1)
        results = _rows_log_probs(rows[kept], chosen[kept], temperature, return_entropy)
        values, entropy = (
            None if t is None else t.new_zeros(shape[0], *t.shape[1:]).index_copy(0, kept, t) for t in results
        )
        values = values.masked_fill(~wanted, 0.0)
    return values.reshape(index.shape), None if entropy is None else entropy.reshape(lead)


def _rows_log_probs(rows, chosen, temperature, return_entropy):
    """Log-probabilities (N, K) of ``rows`` (N, V) at ``chosen`` (N, K), and entropies (N,) or None."""
    # One normaliser serves all K: the others differ from the most likely token's by their logits.
    anchor = chosen[:, 0] if chosen.shape[1] == 1 else rows.detach().argmax(dim=1)
    result = fastcorl_kernels.selective_log_softmax(
        rows, anchor, temperature=temperature, return_entropy=return_entropy
    )
    log_probs, entropy = result if return_entropy else (result, None)
    log_probs = log_probs[:, None]
    if chosen.shape[1] != 1:
        picked = rows.gather(1, torch.cat([chosen.long(), anchor[:, None]], dim=1)).to(accumulator_dtype(rows))
        log_probs = log_probs + (picked[:, :-1] - picked[:, -1:]) / temperature
    return log_probs, entropy
