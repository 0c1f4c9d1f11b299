"""From the arguments of a GRPO loss to the rows that count: checks, advantages, compaction and denominators."""

from dataclasses import dataclass, replace

import torch

from fastcorl_kernels.advantages import group_advantages
from fastcorl_kernels.checks import (
    check_choice,
    check_float_vector,
    check_index_range,
    check_index_vector,
    check_number,
    require,
)

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE = ("token", "sequence")


@dataclass(frozen=True)
class LossSettings:
    """The scalars of a GRPO loss; see ``grpo_loss``."""

    temperature: float = 1.0
    beta: float = 0.0
    eps_low: float | None = 0.2
    eps_high: float | None = 0.2
    delta: float | None = None
    loss_type: str = "grpo"
    importance: str = "token"
    normalizer: float | torch.Tensor | None = None

    def check(self):
        check_number(self.temperature, "temperature", exclusive=True)
        check_number(self.beta, "beta")
        check_choice(self.loss_type, "loss_type", LOSS_TYPES)
        check_choice(self.importance, "importance", IMPORTANCE)
        if self.eps_low is not None:
            check_number(self.eps_low, "eps_low")
        if self.eps_low is not None or self.loss_type == "cispo":
            check_number(self.eps_high, "eps_high")
        if self.delta is not None:
            check_number(self.delta, "delta", exclusive=True)
            require(
                self.loss_type != "cispo", "delta", "None with loss_type='cispo', which eps_high bounds", self.delta
            )
        self._check_normalizer()

    def _check_normalizer(self):
        given = self.normalizer is not None
        require(given or self.loss_type != "dr_grpo", "normalizer", "a number with loss_type='dr_grpo'", None)
        if isinstance(self.normalizer, torch.Tensor):
            require(self.normalizer.numel() == 1, "normalizer", "a number or a tensor of one element", self.normalizer)
            if self.normalizer.device.type == "cpu":
                check_number(self.normalizer.item(), "normalizer", exclusive=True)
        elif given:
            check_number(self.normalizer, "normalizer", exclusive=True)


@dataclass(frozen=True)
class TokenBatch:
    """The M rows that the mask keeps, of N; every tensor is (M,) unless it says otherwise.

    With a ``mask`` of its own, masked rows are still there (M = N) and whoever reads the batch skips them.
    """

    row_count: int  # N
    rows: torch.Tensor | None  # their places among the N rows; None when all count
    mask: torch.Tensor | None
    token_ids: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: torch.Tensor | None
    ref_log_probs: torch.Tensor | None
    weights: torch.Tensor  # each row's share in the loss, one over its denominator
    sequence_ids: torch.Tensor | None  # None, like lengths, where nothing looks across a sequence
    lengths: torch.Tensor | None  # (S,) rows kept of each sequence

    def span(self, start, stop, sequences=None):
        """Rows ``start`` to ``stop`` alone; ``sequences`` (first, last + 1) if they are whole sequences."""
        if stop - start == self.token_ids.shape[0]:
            return self
        names = ("token_ids", "advantages", "old_log_probs", "ref_log_probs", "weights", "sequence_ids")
        fields = {name: getattr(self, name) for name in names}
        fields = {name: None if values is None else values[start:stop] for name, values in fields.items()}
        if sequences is not None:
            first, last = sequences
            fields |= {"sequence_ids": fields["sequence_ids"] - first, "lengths": self.lengths[first:last]}
        return replace(self, rows=None, **fields)

    def scatter(self, values):
        """(M,) to (N,), with 0 on the rows that do not count."""
        if self.rows is None:
            return values
        return values.new_zeros(self.row_count).index_copy_(0, self.rows, values)


def prepare_batch(
    scores,
    vocabulary,
    dtype,
    settings,
    token_ids,
    advantages,
    cu_seqlens,
    rewards,
    group_size,
    old_log_probs,
    ref_log_probs,
    mask,
    importance_ratios=None,
    backend="torch",
    keep_masked=False,
):
    """Check everything and drop the masked rows, or only carry the mask along with ``keep_masked``.

    ``scores`` are the logits or the hidden states, (N, ...). Dropping rows makes the host wait for a CUDA device.
    """
    settings.check()
    row_count, device = scores.shape[0], scores.device
    check_index_vector(token_ids, "token_ids", row_count, scores)
    cu_seqlens = _check_cu_seqlens(cu_seqlens, row_count).to(device)
    for name, value in (("old_log_probs", old_log_probs), ("ref_log_probs", ref_log_probs)):
        if value is not None:
            check_float_vector(value, name, row_count, scores)
    if settings.beta != 0.0 and ref_log_probs is None:
        raise ValueError(f"ref_log_probs: expected a tensor of shape ({row_count},) since beta is not 0, got None")
    if mask is not None:
        fits = isinstance(mask, torch.Tensor) and tuple(mask.shape) == (row_count,) and mask.dtype == torch.bool
        require(fits and mask.device == device, "mask", f"a bool tensor of shape ({row_count},) on {device}", mask)
    sequence_count = cu_seqlens.shape[0] - 1
    advantages = _check_advantages(advantages, rewards, group_size, sequence_count, row_count, scores, backend)
    if importance_ratios is not None:
        _check_per_sequence_or_row(importance_ratios, "importance_ratios", sequence_count, row_count, scores)
        importance_ratios = importance_ratios.detach().contiguous()

    mask = None if mask is None else mask.contiguous()
    rows = None if mask is None or keep_masked else mask.nonzero().squeeze(1)
    if not keep_masked:
        token_ids = _pick(token_ids, rows)
    if vocabulary is not None:  # of a shard nobody knows the whole
        check_index_range(token_ids, "token_ids", vocabulary, mask if keep_masked else None)
    make_table = _triton_table if backend == "triton" and settings.importance == "token" else _torch_table
    advantages = advantages.detach().contiguous()
    with torch.cuda.device_of(scores):
        row_advantages, weights, sequence_ids, lengths = make_table(
            settings, cu_seqlens, row_count, mask, rows, advantages, importance_ratios, dtype
        )
    return TokenBatch(
        row_count=row_count,
        rows=rows,
        mask=mask if keep_masked else None,
        token_ids=token_ids.long().contiguous(),
        advantages=row_advantages,
        old_log_probs=None if old_log_probs is None else _pick(old_log_probs.detach(), rows).to(dtype),
        ref_log_probs=None if ref_log_probs is None else _pick(ref_log_probs.detach(), rows).to(dtype),
        weights=weights,
        sequence_ids=sequence_ids,
        lengths=lengths,
    )


def _torch_table(settings, cu_seqlens, row_count, mask, rows, advantages, importance_ratios, dtype):
    """(advantages, weights, sequence_ids, lengths) of the rows that count."""
    kept = torch.arange(row_count, device=cu_seqlens.device) if rows is None else rows
    sequence_ids = torch.searchsorted(cu_seqlens, kept, right=True) - 1
    lengths = _kept_lengths(cu_seqlens, mask)

    def by_row(values):
        per_sequence = values.shape[0] == cu_seqlens.shape[0] - 1
        return values.index_select(0, sequence_ids) if per_sequence else _pick(values, rows)

    advantages = by_row(advantages).to(dtype)
    if importance_ratios is not None:
        advantages = advantages * by_row(importance_ratios).to(dtype)
    return advantages, _row_weights(settings, lengths, sequence_ids, dtype), sequence_ids, lengths


def _triton_table(settings, cu_seqlens, row_count, mask, rows, advantages, importance_ratios, dtype):
    """The same in one launch, without what only a ratio per sequence needs."""
    from fastcorl_kernels.grpo.triton_kernels import row_table

    normalizer = settings.normalizer
    mean = settings.loss_type == "grpo"
    if normalizer is None:
        if mean or mask is None:
            normalizer = max(cu_seqlens.shape[0] - 1 if mean else row_count, 1)
        else:
            normalizer = mask.sum(dtype=torch.int32).clamp_(min=1).to(dtype)
    elif isinstance(normalizer, torch.Tensor):
        on_host = not normalizer.is_cuda
        normalizer = float(normalizer) if on_host else normalizer.detach().reshape(1).to(dtype)
    table = row_table(cu_seqlens, row_count, mask, advantages, importance_ratios, normalizer, mean=mean)
    return *(_pick(values, rows) for values in table), None, None


def _pick(values, rows):
    """The rows that count, contiguous, as the Triton kernels read them."""
    return values.contiguous() if rows is None else values.index_select(0, rows)


def _check_cu_seqlens(cu_seqlens, row_count):
    fits = isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
    fits = fits and cu_seqlens.dtype in (torch.int32, torch.int64)
    require(fits, "cu_seqlens", "an int32 or int64 tensor of shape (sequences + 1,)", cu_seqlens)
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != row_count or bounds != sorted(bounds):
            expected = f"boundaries that rise from 0 to the {row_count} rows"
            raise ValueError(f"cu_seqlens: expected {expected}, got {bounds}")
    return cu_seqlens.long().contiguous()


def _check_per_sequence_or_row(values, name, sequence_count, row_count, like):
    fits = isinstance(values, torch.Tensor) and values.is_floating_point() and values.dim() == 1
    fits = fits and values.shape[0] in (sequence_count, row_count) and values.device == like.device
    shapes = f"({sequence_count},), one per sequence, or ({row_count},), one per row, on {like.device}"
    require(fits, name, f"a floating tensor of shape {shapes}", values)


def _check_advantages(advantages, rewards, group_size, sequence_count, row_count, like, backend):
    """Advantages (S,) or (N,), given or made from rewards."""
    if (advantages is None) == (rewards is None):
        got = "neither" if advantages is None else "both"
        raise ValueError(f"advantages: expected either advantages or rewards, got {got}")
    if rewards is None:
        require(group_size is None, "group_size", "None without rewards", group_size)
        _check_per_sequence_or_row(advantages, "advantages", sequence_count, row_count, like)
        return advantages
    require(group_size is not None, "group_size", "an integer, since rewards are given", group_size)
    fits = isinstance(rewards, torch.Tensor) and rewards.dim() in (1, 2) and rewards.shape[0] == sequence_count
    fits = fits and rewards.device == like.device
    require(fits, "rewards", f"a tensor of {sequence_count} rows, one per sequence, on {like.device}", rewards)
    return group_advantages(rewards, group_size, backend=None if rewards.dtype == torch.float64 else backend)


def _kept_lengths(cu_seqlens, mask):
    if mask is None:
        return cu_seqlens.diff()
    kept_before = torch.cat([cu_seqlens.new_zeros(1), mask.cumsum(0)])
    return kept_before[cu_seqlens].diff()


def _row_weights(settings, lengths, sequence_ids, dtype):
    """What each row's term is multiplied by, so that the loss is a plain weighted sum."""
    normalizer = settings.normalizer
    if normalizer is None:
        normalizer = lengths.shape[0] if settings.loss_type == "grpo" else sequence_ids.shape[0]
        normalizer = max(normalizer, 1)
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.detach().reshape(()).to(device=lengths.device, dtype=dtype)
    if settings.loss_type == "grpo":
        return (1.0 / (lengths.to(dtype) * normalizer)).index_select(0, sequence_ids)
    return torch.ones(sequence_ids.shape[0], dtype=dtype, device=lengths.device) / normalizer
