"""The GRPO family of losses, from hidden states."""

from fastcorl_kernels.checks import accumulator_dtype, check_backend, check_linear
from fastcorl_kernels.grpo.batch import LossSettings, prepare_batch
from fastcorl_kernels.linear_grpo.autograd import linear_grpo_loss_chunked


def linear_grpo_loss(
    hidden,
    weight,
    token_ids,
    advantages=None,
    *,
    cu_seqlens,
    bias=None,
    rewards=None,
    group_size=None,
    old_log_probs=None,
    ref_log_probs=None,
    mask=None,
    temperature=1.0,
    beta=0.0,
    eps_low=0.2,
    eps_high=0.2,
    delta=None,
    loss_type="grpo",
    importance="token",
    normalizer=None,
    backend=None,
):
    """``grpo_loss(hidden @ weight.T + bias, ...)`` without an (N, V) tensor, forward or backward.

    The gradients are computed in the forward, chunk by chunk, and the backward scales them; masked rows are dropped
    before the first matrix product. Only first derivatives exist. Outside of grad mode no gradient work is done.

    Args:
        hidden: (N, H) floating tensor.
        weight: (V, H) floating tensor. A ``weight``, ``bias`` or ``hidden`` that does not require grad costs no
            gradient.
        bias: (V,) floating tensor or None.
        Everything else as in ``grpo_loss``, papers included.

    Returns:
        GRPOLoss, in float32, or float64 if an operand is float64.

    Raises:
        ValueError: naming the argument that does not fit (the contents of ids and cu_seqlens: on the CPU only).
        RuntimeError: for ``backend="triton"``.
    """
    check_backend(backend)
    check_linear(hidden, weight, bias)
    settings = LossSettings(temperature, beta, eps_low, eps_high, delta, loss_type, importance, normalizer)
    batch = prepare_batch(
        hidden,
        weight.shape[0],
        accumulator_dtype(hidden, weight, bias),
        settings,
        token_ids,
        advantages,
        cu_seqlens,
        rewards,
        group_size,
        old_log_probs,
        ref_log_probs,
        mask,
    )
    return linear_grpo_loss_chunked(hidden, weight, bias, batch, settings)
