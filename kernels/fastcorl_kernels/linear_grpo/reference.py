"""Plain torch form of ``linear_grpo_loss``; holds an (M, V) tensor of the rows that count."""

from fastcorl_kernels.grpo.reference import kept_rows_loss
from fastcorl_kernels.linear_log_softmax.reference import linear_reference


def linear_grpo_loss_reference(hidden, weight, bias, batch, settings):
    """See ``linear_grpo_loss``; ``batch`` from ``prepare_batch``."""
    # Rows are dropped before the product: a NaN in a masked hidden state would reach the weight gradient as 0 * NaN.
    kept = hidden if batch.rows is None else hidden.index_select(0, batch.rows)
    return kept_rows_loss(linear_reference(kept, weight, bias), batch, settings)
