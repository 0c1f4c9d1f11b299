"""The training loop of one stage: rollout -> score -> advantages -> pack -> (reference) -> update."""

import math

from fastcorl.algorithm import (
    CoRLObjective,
    ObjectiveOptions,
    PackOptions,
    StepTotals,
    count_micro_batches,
    pack_rollout,
    packed_log_probs,
)
from fastcorl.config import Config, StageConfig
from fastcorl.data import PromptData, PromptSampler
from fastcorl.model import Policy
from fastcorl.records import PackedBatch, Rollout, Scores, StepRecord
from fastcorl.rewards import BlipCaptioner, RewardSuite
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.engine import learning_rate_at, make_engine
from fastcorl.runtime.step_metrics import StepMetrics
from fastcorl.runtime.telemetry import PhaseTimer
from fastcorl_kernels import group_advantages

# What a task samples: drawings, answers, and answers to which question types.
TASKS = {
    "unified": (True, True, ("MC", "OE")),
    "alternate": (True, True, ("MC", "OE")),
    "t2i": (True, False, ("MC", "OE")),
    "mm2t": (False, True, ("MC", "OE")),
    "mc": (False, True, ("MC",)),
    "oe": (False, True, ("OE",)),
}


def stage_prompts(config: Config, name: str, stage: StageConfig, data: PromptData) -> tuple[PromptData, PromptSampler]:
    """The prompts a stage trains on and the order it takes them in."""
    data = data.only(TASKS[stage.task][2])
    return data, PromptSampler(len(data), config.seed, stage.prompts_per_step, name)


class Trainer:
    """Trains one stage. `reference` is the frozen policy of the KL term, None without one."""

    def __init__(
        self,
        config: Config,
        name: str,
        stage: StageConfig,
        policy: Policy,
        reference: Policy | None,
        captioner: BlipCaptioner | None,
        data: PromptData,
        ranks: Distributed,
        *,
        launched: bool,
    ):
        self.config, self.name, self.stage, self.ranks = config, name, stage, ranks
        self.group_size = stage.group_size or config.algorithm.group_size
        self.learning_rate = stage.learning_rate or config.optimizer.learning_rate
        self.data, self.sampler = stage_prompts(config, name, stage, data)
        self.params = sampling_params(config)
        self.reference = reference
        self.options = objective_options(config, stage, policy.num_image_tokens)
        self.pack_options = PackOptions(
            tokens=config.packing.tokens,
            guided=self.options.guided,
            image_shift=config.compat.ulm_r1_image_shift,
            share_prefix=config.packing.share_prefix,
        )
        objective = CoRLObjective(policy, self.options)
        self.engine = make_engine(objective, config.optimizer, config.deepspeed, ranks, launched=launched)
        policy = self.engine.full_policy()
        self.rollouts = rollout_engine(config, policy)
        self.rewards = RewardSuite(config.rewards, policy, self.rollouts, captioner=captioner)
        self.timer = PhaseTimer()

    def train_step(self, step: int) -> tuple[StepRecord, Rollout, Scores]:
        """Sample, score and update once; `step` counts from 1."""
        draw, answer = self._modalities(step)
        prompts = [self.data[i] for i in self.sampler.for_rank(step, self.ranks.rank, self.ranks.world_size)]
        with self.timer.phase("rollout"):
            self.engine.full_policy()  # under ZeRO 3 it refills the copy that is sampled with
            rollout = self.rollouts.generate(
                prompts,
                self.group_size,
                self.params,
                draw=draw,
                answer=answer,
                seed=(self.config.seed, self.name, step),
            )
        with self.timer.phase("score"):
            scores = self.rewards(rollout)
        with self.timer.phase("pack"):
            advantages = group_advantages(scores.total, self.group_size, scale=self.config.algorithm.advantage_scale)
            batches = self._pack(rollout, advantages)
            totals = self._totals(rollout)
        if self.reference is not None:
            with self.timer.phase("reference"):
                self._add_reference(batches)
        metrics = StepMetrics(rollout, scores, advantages)
        with self.timer.phase("train"):
            for iteration in range(self.config.algorithm.num_iterations):
                self._update(step, batches, totals, metrics, keep_old=iteration == 0)
        record = metrics.record(self.name, step, self.stage.steps, self.timer.take(), self.ranks)
        return record, rollout, scores

    def _update(
        self, step: int, batches: list[PackedBatch], totals: StepTotals, metrics: StepMetrics, *, keep_old: bool
    ) -> None:
        """One optimizer step over all micro-batches."""
        rate = learning_rate_at(step, self.stage.steps, self.learning_rate, self.config.optimizer)
        total = 0.0
        for index, batch in enumerate(batches):
            loss, losses = self.engine.forward(batch, totals)
            self.engine.backward(loss, last=index + 1 == len(batches))
            total += float(loss.detach())
            metrics.add(batch, losses, on_policy=keep_old)
            if keep_old and self.config.algorithm.num_iterations > 1:
                for modality, result in losses.items():
                    getattr(batch, modality).old_log_probs = result.log_probs
        # Every rank must see the same verdict before any of them updates.
        (bad,) = self.ranks.reduce([float(not math.isfinite(total))], "max")
        if bad:
            raise FloatingPointError(f"{self.name} step {step}: the loss is not finite; it was not applied")
        metrics.add_update(total, self.engine.step(rate), rate)
        self.rollouts.weight_version += 1

    def _modalities(self, step: int) -> tuple[bool, bool]:
        if self.stage.task == "alternate":
            return step % 2 == 1, step % 2 == 0
        return TASKS[self.stage.task][:2]

    def _pack(self, rollout: Rollout, advantages) -> list[PackedBatch]:
        count = count_micro_batches(rollout, self.pack_options)
        (most,) = self.ranks.reduce([float(count)], "max")
        return pack_rollout(rollout, advantages, self.pack_options, min_micro_batches=int(most))

    def _totals(self, rollout: Rollout) -> StepTotals:
        num_rows = float(rollout.num_rows)
        local = [
            float(rollout.images.tokens.numel()) if rollout.images else 0.0,
            float(rollout.texts.lengths.sum()) if rollout.texts else 0.0,
        ]
        image_tokens, text_tokens = self.ranks.reduce(local, "mean")
        return StepTotals({"image": num_rows, "text": num_rows}, {"image": image_tokens, "text": text_tokens})

    def _add_reference(self, batches: list[PackedBatch]) -> None:
        for batch in batches:
            for modality, log_probs in packed_log_probs(self.reference, batch, self.options).items():
                getattr(batch, modality).ref_log_probs = log_probs


def rollout_engine(config: Config, policy: Policy) -> RolloutEngine:
    """An engine for weights of version 0."""
    rollout = config.rollout
    return RolloutEngine(policy, max_rows=rollout.max_rows, kv_cache_tokens=rollout.kv_cache_tokens, weight_version=0)


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
    )
