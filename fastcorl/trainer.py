"""The training loop of one stage: rollout -> score -> pack -> (reference) -> advantages -> update."""

import math
from collections.abc import Callable

import torch

from fastcorl.algorithm import (
    CoRLObjective,
    Packer,
    StepTotals,
    gradient_cosine,
    packed_log_probs,
    set_advantages,
)
from fastcorl.config import Config, StageConfig
from fastcorl.data import PromptSource
from fastcorl.experience import Collector, advantages_of, within_budget
from fastcorl.model import Policy
from fastcorl.parts import (
    FrozenMatcher,
    matches_frozen,
    needs_reference,
    objective_options,
    overlaps,
    pack_options,
    reward_suite,
    rollout_engine,
    sampling_params,
)
from fastcorl.records import PackedBatch, Rollout, Scores, StepRecord
from fastcorl.rewards import RewardModels
from fastcorl.rollout import row_seed
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.engine import learning_rate_at, make_engine
from fastcorl.runtime.reference import Reference
from fastcorl.runtime.step_hardware import StepHardware
from fastcorl.runtime.step_metrics import StepMetrics
from fastcorl.runtime.telemetry import PhaseTimer
from fastcorl.runtime.termination import Interrupted
from fastcorl.tasks import TASKS


class Trainer:
    """Trains one stage."""

    def __init__(
        self,
        config: Config,
        name: str,
        stage: StageConfig,
        policy: Policy,
        models: RewardModels,
        prompts: PromptSource,
        ranks: Distributed,
        *,
        launched: bool,
    ):
        self.config, self.name, self.stage, self.ranks = config, name, stage, ranks
        self.algorithm = config.algorithm
        self.learning_rate = stage.learning_rate or config.optimizer.learning_rate
        self.options = objective_options(config, stage, policy.num_image_tokens)
        self.pack_options = pack_options(config, guided=self.options.guided)
        self.objective = CoRLObjective(policy, self.options)
        self.hardware = StepHardware(
            policy,
            ranks,
            guided_sampling=config.rollout.guidance != 1,
            guided_training=self.options.guided,
        )
        self.engine = make_engine(self.objective, config.optimizer, config.deepspeed, ranks, launched=launched)
        policy = self.engine.full_policy()
        self.reference = Reference(policy, self.algorithm.reference) if needs_reference(config, stage) else None
        self.rollouts = rollout_engine(config, policy)
        matcher = FrozenMatcher(self.reference) if matches_frozen(config, stage) else self.rollouts
        self.engines = [self.rollouts]  # that read the weights, and are told when these change
        if models.captioner is None and TASKS[stage.task].draws:  # recaptioning has settings of its own
            self.engines.append(rollout_engine(config, policy))
        rewards = reward_suite(config, models, policy, matcher, self.engines[-1])
        group_size = stage.group_size or config.algorithm.group_size
        self.refused = 0  # steps in a row whose update was not made, because something was not finite
        self.timer = PhaseTimer()
        self.collector = Collector(
            config.algorithm,
            prompts,
            self.rollouts,
            rewards,
            sampling_params(config),
            group_size,
            (config.seed, name),
            ranks,
            self.timer,
            overlap=overlaps(config, policy.device),
        )

    def train_step(
        self, step: int, *, probe: bool = False, stop: Callable[[], bool] = lambda: False
    ) -> tuple[StepRecord, Rollout, Scores]:
        """Sample, score and update; `step` counts from 1. `probe` adds the cosine between the tasks' gradients.

        `stop`, the same on all ranks, is asked before the update: Interrupted leaves the weights as they were.
        """
        draw, answer = self._modalities(step)
        self.hardware.begin()
        with self.timer.phase("rollout"):
            self.engine.full_policy()  # under ZeRO 3 it refills the copy that is sampled with
        rollout, finish_scores = self.collector.collect(step, draw=draw, answer=answer)
        with self.timer.phase("pack"):
            trained = within_budget(rollout, self._rank_budget(), row_seed(self.config.seed, self.name, step))
            batches = self._pack(trained)
            totals = self._totals(trained)
        if self.options.beta:
            with self.timer.phase("reference"), self.reference.policy() as reference:
                self._add_log_probs(reference, batches, "ref_log_probs")
        self._anchor(batches)
        scores = finish_scores()
        with self.timer.phase("pack"):
            advantages = advantages_of(rollout, scores, self.algorithm, self.ranks)
            set_advantages(batches, self._advantages_of_all(advantages))
        metrics = StepMetrics(rollout, scores, advantages)
        if probe and draw and answer:
            with self.timer.phase("probe"):
                metrics.add_figures(gradient_cosine(self.objective, batches, totals, self.ranks.mean))
        if stop():
            raise Interrupted
        with self.timer.phase("train"):
            # After one that was refused the next would see the same weights and the same data.
            updates = range(self.algorithm.num_iterations)
            applied = all(self._update(step, batches, totals, metrics, first=index == 0) for index in updates)
        self.refused = 0 if applied else self.refused + 1
        if not applied:
            metrics.add_figures({"skipped_updates": 1.0})
        if self.algorithm.num_iterations > 1:
            with self.timer.phase("drift"):
                self._measure_drift(batches, metrics)
        seconds = self.timer.take()
        metrics.add_figures(self.timer.take_hidden())
        updates = self.algorithm.num_iterations
        metrics.add_figures(self.hardware.figures(rollout, trained, seconds["train"], updates=updates))
        return metrics.record(self.name, step, self.stage.steps, seconds, self.ranks), rollout, scores

    def close(self) -> None:
        """Free what the stage held; the engine's policy stays the caller's."""
        self.hardware.close()
        self.engine.close()

    def _anchor(self, batches: list[PackedBatch]) -> None:
        """Fix what ratios start from, where it is not the first update's own forward."""
        if self.algorithm.external:  # the ratio of rows of the data needs the policy's own
            with self.timer.phase("anchor"):
                self._add_log_probs(self.engine.full_policy(), batches, "old_log_probs")
        if self.algorithm.old_log_probs == "sampled":
            for rows in (rows for batch in batches for rows in (batch.image, batch.text) if rows is not None):
                sampled = rows.sampled_log_probs
                known = sampled.isfinite()  # rows of the data were not sampled
                rows.old_log_probs = sampled if rows.old_log_probs is None else sampled.where(known, rows.old_log_probs)

    def _update(
        self, step: int, batches: list[PackedBatch], totals: StepTotals, metrics: StepMetrics, *, first: bool
    ) -> bool:
        """One optimizer step over all micro-batches. False where it was not made, since something was not finite."""
        rate = learning_rate_at(step, self.stage.steps, self.learning_rate, self.config.optimizer)
        total = 0.0
        for index, batch in enumerate(batches):
            loss, losses = self.engine.forward(batch, totals)
            self.engine.backward(loss, last=index + 1 == len(batches))
            total = total + loss.detach()
            metrics.add(batch, losses, on_policy=first)
            if first and self.algorithm.num_iterations > 1:
                for modality, result in losses.items():
                    rows = getattr(batch, modality)
                    if rows.old_log_probs is None:
                        rows.old_log_probs = result.log_probs
        norm = self.engine.step(rate)
        metrics.add_update(float(total), norm, rate)
        if not math.isfinite(norm):
            return False
        for engine in self.engines:
            engine.weight_version += 1
        return True

    def _measure_drift(self, batches: list[PackedBatch], metrics: StepMetrics) -> None:
        """How far the updates of a step have taken the policy from where their ratios start."""
        policy = self.engine.full_policy()
        for batch in batches:
            for modality, log_probs in packed_log_probs(policy, batch, self.options).items():
                metrics.add_drift(modality, log_probs - getattr(batch, modality).old_log_probs)

    def _modalities(self, step: int) -> tuple[bool, bool]:
        if self.stage.task == "alternate":
            return step % 2 == 1, step % 2 == 0
        return TASKS[self.stage.task].draws, TASKS[self.stage.task].answers

    def _rank_budget(self) -> int | None:
        budget, ranks = self.algorithm.token_budget, self.ranks
        return None if budget is None else budget // ranks.world_size + (ranks.rank < budget % ranks.world_size)

    def _pack(self, rollout: Rollout) -> list[PackedBatch]:
        return Packer(rollout, self.pack_options).pack_with(self.ranks)

    def _advantages_of_all(self, advantages: torch.Tensor) -> torch.Tensor:
        """Those of the rows of all ranks: a sequence may be trained on by another rank than sampled it."""
        return torch.cat(self.ranks.gather(advantages.cpu())).to(advantages.device)

    def _totals(self, rollout: Rollout) -> StepTotals:
        num_rows = float(rollout.num_rows)
        local = [
            float(rollout.images.tokens.numel()) if rollout.images else 0.0,
            float(self._rank_budget() or rollout.texts.lengths.sum()) if rollout.texts else 0.0,
        ]
        image_tokens, text_tokens = self.ranks.reduce(local, "mean")
        return StepTotals({"image": num_rows, "text": num_rows}, {"image": image_tokens, "text": text_tokens})

    def _add_log_probs(self, policy: Policy, batches: list[PackedBatch], field: str) -> None:
        for batch in batches:
            for modality, log_probs in packed_log_probs(policy, batch, self.options).items():
                setattr(getattr(batch, modality), field, log_probs)
