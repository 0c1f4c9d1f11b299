"""The training loop of one stage: rollout -> score -> advantages -> pack -> (reference) -> update."""

import math

import torch

from fastcorl.algorithm import (
    CoRLObjective,
    ObjectiveOptions,
    PackOptions,
    StepTotals,
    count_micro_batches,
    gradient_cosine,
    pack_rollout,
    packed_log_probs,
)
from fastcorl.config import Config, StageConfig
from fastcorl.data import PromptSource
from fastcorl.experience import Collector, advantages_of, within_budget
from fastcorl.model import Policy
from fastcorl.records import PackedBatch, Rollout, Scores, StepRecord
from fastcorl.rewards import Matcher, PolicyCaptioner, RewardModels, RewardSuite
from fastcorl.rollout import RolloutEngine, SamplingParams, row_seed
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.engine import learning_rate_at, make_engine
from fastcorl.runtime.reference import Reference
from fastcorl.runtime.step_metrics import StepMetrics
from fastcorl.runtime.telemetry import PhaseTimer
from fastcorl.tasks import TASKS

CAPTION_TOKENS = 40


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
        self.pack_options = PackOptions(
            tokens=config.packing.tokens,
            guided=self.options.guided,
            image_shift=config.compat.ulm_r1_image_shift,
            share_prefix=config.packing.share_prefix,
        )
        self.objective = CoRLObjective(policy, self.options)
        self.engine = make_engine(self.objective, config.optimizer, config.deepspeed, ranks, launched=launched)
        policy = self.engine.full_policy()
        frozen_tim = config.rewards.tim == "frozen" and TASKS[stage.task].draws
        needed = bool(self.options.beta) or frozen_tim
        self.reference = Reference(policy, self.algorithm.reference) if needed else None
        self.rollouts = rollout_engine(config, policy)
        matcher = FrozenMatcher(self.reference) if frozen_tim else self.rollouts
        self.engines = [self.rollouts]  # that read the weights, and are told when these change
        if models.captioner is None and TASKS[stage.task].draws:  # recaptioning has settings of its own
            self.engines.append(rollout_engine(config, policy))
        rewards = reward_suite(config, models, policy, matcher, self.engines[-1])
        group_size = stage.group_size or config.algorithm.group_size
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
        )

    def train_step(self, step: int, *, probe: bool = False) -> tuple[StepRecord, Rollout, Scores]:
        """Sample, score and update; `step` counts from 1. `probe` adds the cosine between the tasks' gradients."""
        draw, answer = self._modalities(step)
        with self.timer.phase("rollout"):
            self.engine.full_policy()  # under ZeRO 3 it refills the copy that is sampled with
        rollout, scores = self.collector.collect(step, draw=draw, answer=answer)
        with self.timer.phase("pack"):
            advantages = advantages_of(rollout, scores, self.algorithm, self.ranks)
            trained = within_budget(rollout, self._rank_budget(), row_seed(self.config.seed, self.name, step))
            batches = self._pack(trained, advantages)
            totals = self._totals(trained)
        metrics = StepMetrics(rollout, scores, advantages)
        if self.options.beta:
            with self.timer.phase("reference"), self.reference.policy() as reference:
                self._add_log_probs(reference, batches, "ref_log_probs")
        with self.timer.phase("train"):
            self._anchor(batches)
            if probe and draw and answer:
                metrics.add_figures(gradient_cosine(self.objective, batches, totals, self.ranks.mean))
            for iteration in range(self.algorithm.num_iterations):
                self._update(step, batches, totals, metrics, first=iteration == 0)
            if self.algorithm.num_iterations > 1:
                self._measure_drift(batches, metrics)
        record = metrics.record(self.name, step, self.stage.steps, self.timer.take(), self.ranks)
        return record, rollout, scores

    def _anchor(self, batches: list[PackedBatch]) -> None:
        """Fix what ratios start from, where it is not the first update's own forward."""
        if self.algorithm.external:  # rows of the data were not sampled, and their ratio needs the policy's own
            self._add_log_probs(self.engine.full_policy(), batches, "old_log_probs")
        elif self.algorithm.old_log_probs == "sampled":
            for rows in (rows for batch in batches for rows in (batch.image, batch.text) if rows is not None):
                rows.old_log_probs = rows.sampled_log_probs

    def _update(
        self, step: int, batches: list[PackedBatch], totals: StepTotals, metrics: StepMetrics, *, first: bool
    ) -> None:
        """One optimizer step over all micro-batches."""
        rate = learning_rate_at(step, self.stage.steps, self.learning_rate, self.config.optimizer)
        total = 0.0
        for index, batch in enumerate(batches):
            loss, losses = self.engine.forward(batch, totals)
            self.engine.backward(loss, last=index + 1 == len(batches))
            total += float(loss.detach())
            metrics.add(batch, losses, on_policy=first)
            if first and self.algorithm.num_iterations > 1:
                for modality, result in losses.items():
                    rows = getattr(batch, modality)
                    if rows.old_log_probs is None:
                        rows.old_log_probs = result.log_probs
        # Every rank must see the same verdict before any of them updates.
        (bad,) = self.ranks.reduce([float(not math.isfinite(total))], "max")
        if bad:
            raise FloatingPointError(f"{self.name} step {step}: the loss is not finite; it was not applied")
        metrics.add_update(total, self.engine.step(rate), rate)
        for engine in self.engines:
            engine.weight_version += 1

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
        budget = self.algorithm.token_budget
        return None if budget is None else budget // self.ranks.world_size

    def _pack(self, rollout: Rollout, advantages: torch.Tensor) -> list[PackedBatch]:
        count = count_micro_batches(rollout, self.pack_options)
        (most,) = self.ranks.reduce([float(count)], "max")
        return pack_rollout(rollout, advantages, self.pack_options, min_micro_batches=int(most))

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


class FrozenMatcher:
    """Matches texts and images by the token states of a reference."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self._engine: RolloutEngine | None = None

    def match_states(
        self, pixels: torch.Tensor, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `RolloutEngine.match_states`."""
        with self.reference.policy() as policy:
            if not self.reference.stays:
                return RolloutEngine(policy).match_states(pixels, captions)
            self._engine = self._engine or RolloutEngine(policy, weight_version=0)
            return self._engine.match_states(pixels, captions)


def rollout_engine(config: Config, policy: Policy) -> RolloutEngine:
    """An engine for weights of version 0."""
    rollout = config.rollout
    return RolloutEngine(policy, max_rows=rollout.max_rows, kv_cache_tokens=rollout.kv_cache_tokens, weight_version=0)


def reward_suite(
    config: Config, models: RewardModels, policy: Policy, matcher: Matcher, captions: RolloutEngine
) -> RewardSuite:
    """The rewards of a stage; `captions` samples the policy's own captions where it is the captioner."""
    params = SamplingParams(temperature=0.0, max_new_tokens=CAPTION_TOKENS)
    captioner = PolicyCaptioner(captions, params, config.rewards.caption_instruction)
    return RewardSuite(config.rewards, models, policy, matcher, captioner=captioner)


def sampling_params(config: Config, *, guidance: float | None = None) -> SamplingParams:
    """How a run samples; `guidance` overrides the configured one."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        guidance=rollout.guidance if guidance is None else guidance,
        max_new_tokens=rollout.max_new_tokens,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )


def objective_options(config: Config, stage: StageConfig, num_image_tokens: int) -> ObjectiveOptions:
    """The loss settings of a stage."""
    algorithm = config.algorithm
    return ObjectiveOptions(
        temperature=config.rollout.temperature,
        guidance=config.rollout.guidance,
        policy_logits=algorithm.policy_logits,
        loss_type=algorithm.loss_type,
        importance=algorithm.importance,
        eps_low=algorithm.eps_low,
        eps_high=algorithm.eps_high,
        beta=algorithm.beta if stage.beta is None else stage.beta,
        max_lengths={"image": num_image_tokens, "text": config.rollout.max_new_tokens},
        delta=algorithm.delta,
        external_gamma=algorithm.external_gamma,
    )
