"""Liger-Kernel 0.8.5's GRPO losses, with its signatures, defaults and return values; Liger itself is not needed.

Differences, all deliberate: what lies on a masked position changes nothing, NaN and infinities included; a ratio that
overflows but is clipped away, or meets an advantage of 0, gives no NaN; float64 operands give float64 results; metrics
carry no gradient; ``"luspo"`` sums over a sequence's valid tokens and averages over sequences, as TRL 1.16 does.
``loss_type="sapo"``, ``"vespo"`` and ``use_bias_correction_kl=True`` raise NotImplementedError.
"""

import math
from dataclasses import dataclass

import torch
from torch import distributed
from torch.nn.functional import pad

from fastcorl_kernels.checks import accumulator_dtype, check_choice, check_number, require
from fastcorl_kernels.grpo import grpo_loss
from fastcorl_kernels.grpo.batch import IMPORTANCE, LossSettings, prepare_batch
from fastcorl_kernels.grpo.objective import TokenLosses, token_terms
from fastcorl_kernels.linear_grpo import linear_grpo_loss
from fastcorl_kernels.linear_log_softmax import linear_selective_log_softmax
from fastcorl_kernels.log_softmax import selective_log_softmax

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")


def triton_grpo_loss(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    max_completion_length=None,
    importance_sampling_level="token",
    reduce=False,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vllm_is_ratio=None,
    delta=None,
    use_bias_correction_kl=False,
    num_items_in_batch=None,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
):
    """``liger_kernel.transformers.grpo_loss.triton_grpo_loss``, differentiable in ``logits``.

    Args:
        logits: (B, L + 1, V) floating, any strides; position t scores completion_ids[:, t], the last one nothing.
        old_logp: (B, L) floating, or None for this policy's own.
        ref_logp: (B, L) floating; needed if ``beta`` is not 0.
        completion_ids: (B, L) int32 or int64.
        advantages: (B,) floating.
        completion_mask: (B, L) of any dtype, 0 where a position does not count; None counts all.
        eps_high: for ``"cispo"`` the cap itself, otherwise the distance of the clip above 1.
        inplace: accepted; the logits are never overwritten.
        max_completion_length: for ``"dr_grpo"``; L by default.
        vllm_is_ratio: (B,), (B, 1) or (B, L) floating; multiplies the policy term, but not the KL term.
        num_items_in_batch: number or tensor; over the number of processes, it replaces the token count of ``"dapo"``
            and ``"cispo"``.
        sapo_*, vespo_*: accepted; they belong to loss types that are not offered.
        Everything else as in ``fastcorl_kernels.grpo_loss``.

    Returns:
        With ``reduce=False`` (loss, kl, is_clipped), each (B, L) and 0 where masked: the loss is differentiable with
        any upstream gradient (at the cost of a copy of the rows that count), kl is None if ``beta`` is 0. With
        ``reduce=True`` (loss, metrics): a scalar, and the list of the mean kl (unless ``beta`` is 0) and the clip
        ratio. float32, or float64 for float64 logits.

    Raises:
        ValueError: naming the argument that does not fit.
        NotImplementedError: for the options named at the top of this module.
    """
    _check_offered(loss_type, use_bias_correction_kl)
    fits = isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[1] >= 1
    require(fits and logits.is_floating_point(), "logits", "a floating tensor of shape (B, L + 1, V)", logits)
    batch_size, width, vocabulary = logits.shape
    mask = _check_mask(completion_mask, "completion_mask", (batch_size, width - 1), logits.device)
    completions = Completions(
        mask, width, loss_type, importance_sampling_level, advantages, old_logp, eps_low, eps_high
    )
    _check_dense(completion_ids, "completion_ids", completions)
    _check_dense(old_logp, "old_logp", completions, optional=True)
    _check_dense(ref_logp, "ref_logp", completions, optional=beta == 0.0)
    rows = logits.reshape(-1, vocabulary)
    arguments = completions.arguments(completion_ids, ref_logp if beta != 0.0 else None, vllm_is_ratio)
    settings = {"temperature": temperature, "beta": beta, "eps_low": eps_low, "delta": delta}
    settings |= {"eps_high": completions.eps_high, "importance": importance_sampling_level}
    if not reduce:
        settings = LossSettings(loss_type="cispo" if loss_type == "cispo" else "grpo", **settings)
        return _per_token(rows, completions, arguments, settings)
    length = width - 1 if max_completion_length is None else max_completion_length
    result = grpo_loss(rows, **arguments, **settings, **_reduction(loss_type, mask, length, num_items_in_batch))
    return result.loss, _metrics(result, completions, beta)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``: the loss from hidden states, without a (B, T, V) tensor.

    Args:
        beta, temperature, delta, epsilon_low, epsilon_high, importance_sampling_level: as in
            ``fastcorl_kernels.linear_grpo_loss``, but for ``"cispo"`` epsilon_high is the cap itself.
        compiled, chunk_size: accepted without effect; chunks are sized by memory.
        use_ref_model: if False, reference log-probabilities are ignored and the KL term is 0.
        loss_type: ``"grpo"``, ``"bnpo"``, ``"dr_grpo"``, ``"dapo"``, ``"cispo"`` or ``"luspo"``.
        max_completion_length: needed for ``"dr_grpo"``.
        sapo_*, vespo_*: accepted; they belong to loss types that are not offered.

    Raises:
        ValueError: naming the argument that does not fit.
        NotImplementedError: for the options named at the top of this module.
    """

    def __init__(
        self,
        beta=0.04,
        compiled=True,
        use_ref_model=True,
        chunk_size=1,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="dapo",
        max_completion_length=None,
        importance_sampling_level="token",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        temperature=1.0,
        delta=None,
        use_bias_correction_kl=False,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    ):
        super().__init__()
        _check_offered(loss_type, use_bias_correction_kl)
        if delta is not None:
            check_number(delta, "delta", exclusive=True)
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        """The loss and its metrics.

        Args:
            _input: (B, T, H) floating hidden states.
            lin_weight: (V, H) floating.
            selected_token_ids: (B, T) int32 or int64.
            attention_mask: (B, T) of any dtype, 0 where a position does not count.
            advantages: (B,) floating.
            bias: (V,) floating or None.
            ref_per_token_logps: (B, T) floating; None computes them from ``ref_input`` (B, T, H), ``ref_weight`` (V, H)
                and ``ref_bias`` (V,).
            old_per_token_logps: (B, T) floating, or None for this policy's own.
            vllm_is_ratio, num_items_in_batch: as in ``triton_grpo_loss``.

        Returns:
            (loss, metrics): a scalar, and the tuple of the mean kl (unless ``beta`` is 0) and the clip ratio. float32,
            or float64 if an operand is float64.
        """
        fits = isinstance(_input, torch.Tensor) and _input.dim() == 3 and _input.is_floating_point()
        require(fits, "_input", "a floating tensor of shape (B, T, H)", _input)
        batch_size, width, hidden_size = _input.shape
        mask = _check_mask(attention_mask, "attention_mask", (batch_size, width), _input.device)
        clip = (self.epsilon_low, self.epsilon_high)
        completions = Completions(
            mask, width, self.loss_type, self.importance_sampling_level, advantages, old_per_token_logps, *clip
        )
        _check_dense(selected_token_ids, "selected_token_ids", completions)
        _check_dense(old_per_token_logps, "old_per_token_logps", completions, optional=True)
        _check_dense(ref_per_token_logps, "ref_per_token_logps", completions, optional=True)
        # The products take operands in autocast's precision, as they would without us; the sums keep ours.
        hidden, weight, bias, ref_input, ref_weight, ref_bias = autocast_operands(
            _input, lin_weight, bias, ref_input, ref_weight, ref_bias
        )
        with torch.autocast(_input.device.type, enabled=False):
            wanted = self.use_ref_model and self.beta != 0.0
            reference = ref_per_token_logps if wanted else None
            if wanted and reference is None:
                require(ref_input is not None, "ref_per_token_logps", "a tensor, or ref_input and ref_weight", None)
                reference = self._reference_log_probs(ref_input, ref_weight, ref_bias, selected_token_ids, mask)
            result = linear_grpo_loss(
                hidden.reshape(-1, hidden_size),
                weight,
                bias=bias,
                temperature=self.temperature,
                # Without a reference the policy is its own: a KL term of 0, and no gradient.
                beta=self.beta if reference is not None else 0.0,
                eps_low=self.epsilon_low,
                eps_high=completions.eps_high,
                delta=self.delta,
                importance=self.importance_sampling_level,
                **completions.arguments(selected_token_ids, reference, vllm_is_ratio),
                **_reduction(self.loss_type, mask, self.max_completion_length, num_items_in_batch),
            )
        return result.loss, tuple(_metrics(result, completions, self.beta))

    @torch.no_grad()
    def _reference_log_probs(self, ref_input, ref_weight, ref_bias, token_ids, mask):
        """(B, T), 0 where masked."""
        log_probs = linear_selective_log_softmax(
            ref_input[mask], ref_weight, token_ids[mask], bias=ref_bias, temperature=self.temperature
        )
        return log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs)


@dataclass(frozen=True)
class Completions:
    """(B, L) completions, and how they become ``width`` flat rows per sequence; rows past L do not count."""

    mask: torch.Tensor  # (B, L) bool
    width: int
    loss_type: str
    importance: str
    advantages: torch.Tensor
    old_log_probs: torch.Tensor | None
    eps_low: float
    liger_eps_high: float

    def __post_init__(self):
        check_choice(self.importance, "importance_sampling_level", IMPORTANCE)
        shape = (self.mask.shape[0],)
        fits = isinstance(self.advantages, torch.Tensor) and self.advantages.shape == shape
        require(fits, "advantages", f"a floating tensor of shape {shape}", self.advantages)
        if self.loss_type == "cispo":
            check_number(self.liger_eps_high, "eps_high", exclusive=True)

    @property
    def capped_below_one(self):
        """Liger's cispo caps the ratio at eps_high, ours at 1 + eps_high, with eps_high at least 0."""
        return self.loss_type == "cispo" and self.liger_eps_high < 1.0

    @property
    def eps_high(self):
        if self.loss_type != "cispo":
            return self.liger_eps_high
        return 0.0 if self.capped_below_one else self.liger_eps_high - 1.0

    def arguments(self, token_ids, ref_log_probs, ratios):
        """The tensor arguments of ``grpo_loss``."""
        old, advantages = self.old_log_probs, self.advantages
        if self.capped_below_one:  # min(ratio, cap) = cap * min(ratio / cap, 1)
            old = None if old is None else old + math.log(self.liger_eps_high)
            advantages = advantages * self.liger_eps_high
        count = self.mask.shape[0]
        arguments = {
            "token_ids": self.flat(token_ids),
            "advantages": advantages,
            "cu_seqlens": torch.arange(0, (count + 1) * self.width, self.width, device=self.mask.device),
            "old_log_probs": self.flat(old),
            "ref_log_probs": self.flat(ref_log_probs),
            "mask": self.flat(self.mask),
        }
        if ratios is not None:
            shapes = [(count,), (count, 1), tuple(self.mask.shape)]
            fits = isinstance(ratios, torch.Tensor) and tuple(ratios.shape) in shapes
            require(fits, "vllm_is_ratio", "a tensor of shape " + ", ".join(map(str, shapes)), ratios)
            per_sequence = ratios.dim() == 1 or ratios.shape[1] == 1
            arguments["importance_ratios"] = ratios.reshape(-1) if per_sequence else self.flat(ratios)
        return arguments

    def flat(self, values):
        """(B, L) to (B * width,)."""
        return None if values is None else pad(values, (0, self.width - values.shape[1])).reshape(-1)

    def dense(self, values):
        """(B * width,) to (B, L)."""
        return values.view(-1, self.width)[:, : self.mask.shape[1]]

    def is_clipped(self, log_probs):
        """(B, L) bool: where the clip binds, as Liger counts it, from ``log_probs`` (B, L)."""
        old = log_probs if self.old_log_probs is None else self.old_log_probs.to(log_probs.dtype)
        log_ratio = torch.where(self.mask, log_probs - old, 0.0)
        if self.importance == "sequence":
            log_ratio = log_ratio.sum(dim=1, keepdim=True) / self.mask.sum(dim=1, keepdim=True).clamp(min=1)
        ratio, advantages = log_ratio.exp(), self.advantages[:, None]
        if self.loss_type == "cispo":
            return (ratio > self.liger_eps_high) & (advantages > 0) & self.mask
        too_low = (ratio < 1.0 - self.eps_low) & (advantages < 0)
        too_high = (ratio > 1.0 + self.liger_eps_high) & (advantages > 0)
        return (too_low | too_high) & self.mask


def autocast_operands(*operands):
    """Operands of a matrix product (None entries pass) in the type that autocast, where it is on, would give them."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands)


def _check_offered(loss_type, use_bias_correction_kl):
    if loss_type in ("sapo", "vespo"):
        raise NotImplementedError(f"loss_type: {loss_type!r} is not implemented; one of {', '.join(LOSS_TYPES)} is")
    check_choice(loss_type, "loss_type", LOSS_TYPES)
    if use_bias_correction_kl:
        raise NotImplementedError("use_bias_correction_kl: True is not implemented")


def _check_mask(mask, name, shape, device):
    """A (B, L) bool mask."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    require(isinstance(mask, torch.Tensor) and tuple(mask.shape) == shape, name, f"a tensor of shape {shape}", mask)
    return mask != 0


def _check_dense(values, name, completions, optional=False):
    shape = tuple(completions.mask.shape)
    fits = isinstance(values, torch.Tensor) and tuple(values.shape) == shape
    require(fits or (optional and values is None), name, f"a tensor of shape {shape}", values)


def _reduction(loss_type, mask, max_completion_length, num_items_in_batch):
    """Our ``loss_type`` and ``normalizer`` for Liger's reduction."""
    sequences = max(mask.shape[0], 1)
    if loss_type in ("luspo", "dr_grpo"):
        length = 1 if loss_type == "luspo" else max_completion_length
        check_number(length, "max_completion_length", exclusive=True)
        return {"loss_type": "dr_grpo", "normalizer": sequences * length}
    normalizer = _token_normalizer(mask, num_items_in_batch) if loss_type in ("dapo", "cispo") else None
    return {"loss_type": loss_type, "normalizer": normalizer}


def _token_normalizer(mask, num_items_in_batch):
    """Tokens per process, at least 1; None stands for those of this batch."""
    parallel = distributed.is_available() and distributed.is_initialized()
    if num_items_in_batch is None and not parallel:
        return None
    processes = distributed.get_world_size() if parallel else 1
    if num_items_in_batch is None:
        num_items_in_batch = mask.sum()
        distributed.all_reduce(num_items_in_batch)
    if isinstance(num_items_in_batch, torch.Tensor):
        return (num_items_in_batch / processes).clamp(min=1.0)
    return max(num_items_in_batch / processes, 1.0)


def _per_token(rows, completions, arguments, settings):
    """Loss, k3 (None if beta is 0) and whether the clip binds, (B, L) each."""
    dtype = accumulator_dtype(rows)
    batch = prepare_batch(rows, rows.shape[1], dtype, settings, rewards=None, group_size=None, **arguments)
    # The rows that count are copied out first: a NaN among the others would come back from the backward as 0 * NaN.
    log_probs = selective_log_softmax(
        rows.index_select(0, batch.rows), batch.token_ids, temperature=settings.temperature
    )
    loss = completions.dense(batch.scatter(TokenLosses.apply(log_probs, batch, settings)))
    kl = None
    if settings.beta != 0.0:
        kl = completions.dense(batch.scatter(token_terms(log_probs, batch, settings).kl))
    clipped = completions.is_clipped(completions.dense(batch.scatter(log_probs.detach())))
    return loss, kl, clipped.to(dtype)


def _metrics(result, completions, beta):
    clipped = completions.is_clipped(completions.dense(result.log_probs))
    clip_ratio = clipped.sum() / completions.mask.sum().clamp(min=1).to(result.log_probs.dtype)
    if beta == 0.0:
        return [clip_ratio]
    return [torch.zeros_like(clip_ratio) if result.kl is None else result.kl, clip_ratio]
