"""Plain torch GRPO loss from logits; holds the (N, V) log-probabilities, and differentiates them by autograd."""

from dataclasses import replace

from fastcorl_kernels.grpo.objective import TokenLosses, summarize, token_terms
from fastcorl_kernels.log_softmax.reference import entropy_reference, guided_reference, log_softmax_reference


def grpo_loss_reference(logits, batch, settings, uncond=None, guidance=1.0):
    """See ``grpo_loss``; logits and uncond (N, V), ``batch`` from ``prepare_batch``."""
    logits, uncond = (
        operand if operand is None or batch.rows is None else operand.index_select(0, batch.rows)
        for operand in (logits, uncond)
    )
    return kept_rows_loss(guided_reference(logits, uncond, guidance), batch, settings)


def kept_rows_loss(logits, batch, settings):
    """The loss from the logits of the rows that count, (M, V)."""
    log_p = log_softmax_reference(logits, settings.temperature)
    log_probs = log_p.gather(1, batch.token_ids[:, None]).squeeze(1)
    result = summarize(token_terms(log_probs, batch, settings), entropy_reference(log_p.detach()), batch)
    return replace(result, loss=(batch.weights * TokenLosses.apply(log_probs, batch, settings)).sum())
