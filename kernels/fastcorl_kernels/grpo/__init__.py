"""The GRPO family of losses, from logits."""

from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import accumulator_dtype, check_float_matrix, check_guidance
from fastcorl_kernels.grpo.autograd import differentiable_grpo_loss
from fastcorl_kernels.grpo.batch import LossSettings, prepare_batch
from fastcorl_kernels.grpo.objective import GRPOLoss
from fastcorl_kernels.log_softmax import logits_source

__all__ = ["GRPOLoss", "grpo_loss"]


def grpo_loss(
    logits,
    token_ids,
    advantages=None,
    *,
    cu_seqlens,
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
    backend=None,
):
    """Log-probabilities, importance ratio, clip, KL and reduction in one call, differentiable in ``logits``.

    Per row, with ratio = exp(log_prob - old_log_prob) and A the advantage:
    ``-min(min(ratio, delta) * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) + beta * k3``.

    Args:
        logits: (N, V) floating tensor, any strides; row i is the distribution that token_ids[i] was drawn from.
        token_ids: (N,) int32 or int64.
        advantages: (S,), one per sequence, or (N,), one per row; floating. When S = N they are per sequence.
        cu_seqlens: (S + 1,) int32 or int64; sequence s holds rows cu_seqlens[s] to cu_seqlens[s + 1]. May be empty.
        rewards, group_size: instead of advantages: ``group_advantages(rewards, group_size)``, rewards (S,) or (S, k).
        old_log_probs: (N,) of the sampling policy; None means this policy's own, detached: the ratio is 1.
        ref_log_probs: (N,) of the frozen reference; needed if ``beta`` is not 0, otherwise only reported.
        mask: (N,) bool; False rows are skipped: whatever lies on them, in any argument, changes nothing.
        temperature: positive number that divides the logits.
        beta: weight of the KL term, k3 = exp(ref - lp) - (ref - lp) - 1, at least 0.
        eps_low, eps_high: the clip; ``eps_low=None`` means unclipped ratio * A.
        delta: caps the unclipped ratio from above before the minimum is taken; None means no cap.
        loss_type: the reduction over rows. ``"grpo"`` (arXiv:2402.03300): mean over a sequence's rows, then over all
            sequences, empty ones included. ``"bnpo"``, ``"dapo"`` (arXiv:2503.14476): sum over rows, over their number.
            ``"dr_grpo"`` (arXiv:2503.20783): sum over rows, over ``normalizer``. ``"cispo"`` (arXiv:2506.13585):
            ``-min(ratio, 1 + eps_high).detach() * A * log_prob``, sum over rows, over their number.
        importance: ``"token"``, or ``"sequence"`` (GSPO, arXiv:2507.18071): the ratio is exp of the mean log-ratio over
            the sequence's rows, and carries the gradient.
        normalizer: number or one-element tensor that replaces the denominator, for data parallelism and accumulation:
            of the row count, or for ``"grpo"`` of the sequence count. ``"dr_grpo"`` requires it.
        importance_ratios: (S,) or (N,), floating; correct for a behaviour policy other than the old one (truncated
            importance sampling): they multiply the policy term, not the KL, and carry no gradient.
        policy: ``"cond"``, or ``"cfg"``: the policy is the guided distribution u + guidance * (c - u).
        uncond: (N, V), with ``policy="cfg"`` the logits u without the condition; ``logits`` are c. Both get
            gradients; detach u to keep it fixed, and it costs none.
        guidance: weight of the guidance, at least 0.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA (torch for float64).

    Returns:
        GRPOLoss, in float32, or float64 for float64 logits. No gradient flows into anything but the logits.
        Their gradient is computed in the forward, and the backward scales it. Only first derivatives exist.

    Raises:
        ValueError: naming the argument that does not fit (the contents of ids and cu_seqlens: on the CPU only).
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    check_float_matrix(logits, "logits", "(N, V)")
    check_guidance(policy, uncond, guidance, "uncond", logits)
    settings = LossSettings(temperature, beta, eps_low, eps_high, delta, loss_type, importance, normalizer)
    backend = resolve_backend(backend, logits)
    batch = prepare_batch(
        logits,
        logits.shape[1],
        accumulator_dtype(logits),
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
        backend,
        keep_masked=backend == "triton" and importance == "token" and mask is not None,
    )
    source = logits_source(backend)(logits, uncond, guidance, temperature, batch.rows)
    return differentiable_grpo_loss(source, batch, settings)
