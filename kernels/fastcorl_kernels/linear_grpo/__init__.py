"""The GRPO family of losses, from hidden states."""

from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import accumulator_dtype, check_guidance, check_linear
from fastcorl_kernels.grpo.autograd import differentiable_grpo_loss
from fastcorl_kernels.grpo.batch import LossSettings, prepare_batch
from fastcorl_kernels.linear_log_softmax import head_source
from fastcorl_kernels.shard import make_shard


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
    importance_ratios=None,
    policy="cond",
    uncond=None,
    guidance=1.0,
    process_group=None,
    vocab_start=None,
    backend=None,
):
    """``grpo_loss(hidden @ weight.T + bias, ...)`` without an (N, V) tensor, forward or backward.

    The gradients are computed in the forward, chunk by chunk, and the backward scales them; masked rows are dropped
    before the first matrix product. Only first derivatives exist. Outside of grad mode no gradient work is done.

    Args:
        hidden: (N, H) floating tensor.
        weight: (V, H) floating tensor. A ``weight``, ``bias`` or ``hidden`` that does not require grad costs no
            gradient.
        bias: (V,) floating tensor or None. The Triton path adds it in the type of the product: a float32 bias of a
            16-bit head is rounded to 16 bits, as the sum is, but for the drawn token.
        uncond: (N, H), with ``policy="cfg"`` the hidden states without the condition. A head is linear, so the
            guided logits are those of the guided hidden states, and cost one matrix product.
        process_group: splits the vocabulary: weight and bias are this process's rows of the head, everything else is
            the same on every process. The result is too, and so is the gradient of hidden, already summed. What
            requires a gradient must agree between processes.
        vocab_start: id of weight's first row; by default the group's rank times V.
        Everything else as in ``grpo_loss``, papers included. A mask, or ``importance="sequence"``, makes the host wait
        for a CUDA device once, to learn how many rows there are.

    Returns:
        GRPOLoss, in float32, or float64 if an operand is float64.

    Raises:
        ValueError: naming the argument that does not fit (the contents of ids and cu_seqlens: on the CPU only).
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    check_linear(hidden, weight, bias)
    check_guidance(policy, uncond, guidance, "uncond", hidden)
    settings = LossSettings(temperature, beta, eps_low, eps_high, delta, loss_type, importance, normalizer)
    backend = resolve_backend(backend, hidden, weight, bias)
    shard = make_shard(process_group, vocab_start, weight)
    batch = prepare_batch(
        hidden,
        weight.shape[0] if shard is None else None,
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
        importance_ratios,
        "torch" if shard is not None else backend,
    )
    if uncond is not None:
        dtype = accumulator_dtype(hidden)
        guided = uncond.to(dtype) + guidance * (hidden.to(dtype) - uncond.to(dtype))
        hidden = guided.to(hidden.dtype)
    source = head_source(backend)(hidden, weight, bias, temperature, batch.rows, shard)
    return differentiable_grpo_loss(source, batch, settings)
