"""Figures of one step, summed over micro-batches and ranks."""

import math

import torch

from fastcorl.records import PackedBatch, Rollout, Scores, StepRecord
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.telemetry import peak_memory_gib

# What each loss carries as a mean over its valid tokens.
TOKEN_MEANS = ("entropy", "kl", "clip_fraction")


def group_ranges(values: torch.Tensor, known: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest of the `known` ones of (n,) values in each group, (n / group_size,); inf and -inf where there
    is none, so that a group tells something exactly where the greatest is over the least."""
    groups, unknown = values.view(-1, group_size), ~known.view(-1, group_size)
    return groups.masked_fill(unknown, torch.inf).amin(1), groups.masked_fill(unknown, -torch.inf).amax(1)


class StepMetrics:
    """Collects sums and weights under names; `record` divides one by the other over all ranks.

    Figures of micro-batches stay on the device until then: reading one would keep the next forward waiting.
    """

    def __init__(self, rollout: Rollout, scores: Scores, advantages: torch.Tensor):
        self._sums: dict[str, list[float | torch.Tensor]] = {}
        self._largest: dict[str, float | torch.Tensor] = {}
        self._figures: dict[str, float] = {}
        self._loss, self._grad_norm, self._learning_rate = 0.0, 0.0, 0.0
        sampled = ~rollout.external_rows().to(scores.total.device)
        num_sampled = int(sampled.sum())
        self.tokens = 0  # sampled ones, whatever the packs share
        self.images = 0 if rollout.images is None else num_sampled
        for name, values in {"total": scores.total, **scores.parts}.items():
            self._add_reward(name, values, sampled, rollout.group_size)
        self._add("unscored_rows", float((~scores.total[sampled].isfinite()).sum()), num_sampled)
        groups = advantages.view(-1, rollout.group_size)
        self._add("flat_groups", float((groups == 0).all(1).sum()), len(groups))
        self._add("failed_rewards", float(len(scores.failures)), 1)
        if rollout.images is not None:
            self.tokens += num_sampled * rollout.images.tokens.shape[1]
            gap = (rollout.images.log_probs - rollout.images.cond_log_probs)[sampled].abs()
            self._add("guidance_gap", float(gap.sum()), gap.numel())
        if rollout.texts is not None:
            lengths = rollout.texts.lengths[sampled]
            self.tokens += int(lengths.sum())
            self._add("answer_tokens", float(lengths.sum()), num_sampled)
            self._add("unfinished", float((~rollout.texts.finished[sampled]).sum()), num_sampled)

    def _add_reward(self, name: str, values: torch.Tensor, sampled: torch.Tensor, group_size: int) -> None:
        """Of the rows that were sampled: mean, range, share without a value; share of groups whose values are equal."""
        known = values.isfinite() & sampled
        self._add(f"{name}/unscored", float((sampled & ~known).sum()), int(sampled.sum()))
        self._add(f"reward/{name}", float(values[known].sum()), int(known.sum()))
        low, high = group_ranges(values, known, group_size)
        # The least value is kept as the largest of the negatives; infinite where no row has a value.
        self._largest |= {f"{name}/max": float(high.max()), f"{name}/min": -float(low.min())}
        self._add(f"{name}/flat", float((~(high > low)).sum()), len(low))

    def add(self, batch: PackedBatch, losses: dict, *, on_policy: bool) -> None:
        """Figures of one micro-batch: `losses` are its GRPOLoss by modality; `on_policy` before the first update."""
        for modality, result in losses.items():
            rows = getattr(batch, modality)
            count = len(rows.targets)
            if rows.external is not None:
                count = rows.cu_seqlens.diff().where(~rows.external, 0).sum()
            for name in TOKEN_MEANS:
                value = getattr(result, name)
                if value is not None:
                    self._add(f"{modality}_{name}", value.detach().double() * count, count)
            ratio_max = result.ratio_max.detach().double()
            largest = self._largest.get(f"{modality}_ratio_max", ratio_max)
            self._largest[f"{modality}_ratio_max"] = torch.maximum(largest, ratio_max)
            if on_policy:
                # How far the trained distribution is from the sampled one; 0 up to rounding when all is right.
                self._add_distance(f"{modality}_mismatch", result.log_probs - rows.sampled_log_probs)

    def add_drift(self, modality: str, change: torch.Tensor) -> None:
        """`change` (R,) of log-probs since before the step's first update."""
        self._add_distance(f"{modality}_drift", change)

    def add_figures(self, figures: dict[str, float]) -> None:
        """Figures that are the same on every rank."""
        self._figures |= figures

    def add_update(self, loss: float, grad_norm: float, learning_rate: float) -> None:
        self._loss, self._grad_norm, self._learning_rate = loss, grad_norm, learning_rate

    def record(
        self, stage: str, step: int, total_steps: int, seconds: dict[str, float], ranks: Distributed
    ) -> StepRecord:
        """The step's record over all ranks; a collective call."""
        # A rank may lack what others have: a micro-batch of one modality, a user's reward that did not apply.
        self._read()
        found = ranks.gather((list(self._sums), list(self._largest)))
        names = sorted({name for sums, _ in found for name in sums})
        flat = [value for name in names for value in self._sums.get(name, (0.0, 0))]
        reduced = ranks.reduce([*flat, float(self.tokens), float(self.images)])
        means = {
            name: reduced[2 * i] / reduced[2 * i + 1] if reduced[2 * i + 1] else math.nan
            for i, name in enumerate(names)
        }
        (loss,) = ranks.reduce([self._loss], "mean")
        order = sorted({name for _, largest in found for name in largest})
        largest = dict(
            zip(order, ranks.reduce([self._largest.get(name, -math.inf) for name in order], "max"), strict=True)
        )
        largest |= {name: -value for name, value in largest.items() if name.endswith("/min")}
        largest = {name: value if math.isfinite(value) else math.nan for name, value in largest.items()}
        kl = [means.pop(name) for name in ("image_kl", "text_kl") if name in means]
        metrics = {"loss": loss, **({"kl": sum(kl) / len(kl)} if kl else {})}
        metrics |= {name: value for name, value in means.items() if not name.startswith("reward/")} | largest
        metrics |= {"grad_norm": self._grad_norm, "learning_rate": self._learning_rate, **self._figures}
        return StepRecord(
            stage=stage,
            step=step,
            total_steps=total_steps,
            rewards={
                name.removeprefix("reward/"): value for name, value in means.items() if name.startswith("reward/")
            },
            metrics=metrics,
            seconds=seconds,
            tokens=round(reduced[-2]),
            images=round(reduced[-1]),
            memory_gib=peak_memory_gib(),
        )

    def _add(self, name: str, total: float | torch.Tensor, count: int | torch.Tensor) -> None:
        former = self._sums.get(name, [0.0, 0.0])
        self._sums[name] = [former[0] + total, former[1] + count]

    def _add_distance(self, name: str, differences: torch.Tensor) -> None:
        """The mean of their absolute values, where known: rows of the data were not sampled."""
        distances = differences.detach().abs()
        known = distances.isfinite()
        self._add(name, distances.where(known, 0).sum().double(), known.sum())

    def _read(self) -> None:
        """All figures as numbers."""
        self._sums = {name: [float(total), float(count)] for name, (total, count) in self._sums.items()}
        self._largest = {name: float(value) for name, value in self._largest.items()}
