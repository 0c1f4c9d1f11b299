"""A unified CoRL step as the public trainer runs it: micro-batch by micro-batch sample, score and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import JanusForConditionalGeneration, JanusProcessor

from bench.baselines.plain_inputs import PlainInputs, prepare
from bench.baselines.plain_loss import answer_log_probs, drawing_log_probs, policy_loss
from bench.baselines.plain_rollout import PlainSampler
from fastcorl.records import Prompt, Rollout, Scores
from fastcorl.rollout import join_groups, take_groups
from fastcorl.runtime.telemetry import PhaseTimer

EPSILON = 1e-4  # in the public code's advantages


@dataclass(frozen=True)
class PlainSettings:
    """`rows`: of the backbone in a micro-batch's sampling of drawings; a guided drawing takes two. `beta` weighs the k3
    term to the reference."""

    group_size: int
    guidance: float
    max_new_tokens: int
    temperature: float = 1.0
    rows: int = 16
    beta: float = 0.0
    learning_rate: float = 4e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    @property
    def prompts_at_once(self) -> int:
        copies = 1 if self.guidance == 1 else 2
        return max(1, self.rows // (copies * self.group_size))


@dataclass(frozen=True)
class StepResult:
    """`samples` and `rewards` of all micro-batches, the loss of the step, and its seconds by phase."""

    samples: Rollout
    rewards: torch.Tensor  # (n,) float32
    loss: float
    seconds: dict[str, float]


class PlainTrainer:
    """Trains the backbone and the text head of `janus` in place; all else is frozen.

    The model keeps its dtype, and its attention should be transformers' "sdpa". `rewards` scores the rollout of a
    micro-batch; see `plain_rewards`.
    """

    def __init__(
        self,
        janus: JanusForConditionalGeneration,
        processor: JanusProcessor,
        rewards: Callable[[Rollout], Scores],
        settings: PlainSettings,
        reference: JanusForConditionalGeneration | None = None,
    ):
        if (reference is None) != (settings.beta == 0):
            raise ValueError("a reference goes with beta, and beta with a reference")
        self.janus, self.processor, self.rewards, self.settings = janus.eval(), processor, rewards, settings
        self.reference = reference
        janus.requires_grad_(False)
        for module in (janus.model.language_model, janus.lm_head):
            module.requires_grad_(True)
        self.trained = [parameter for parameter in janus.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.sample = PlainSampler(
            janus,
            processor,
            group_size=settings.group_size,
            temperature=settings.temperature,
            guidance=settings.guidance,
            max_new_tokens=settings.max_new_tokens,
        )
        self.timer = PhaseTimer()

    def step(self, prompts: Sequence[Prompt]) -> StepResult:
        """One optimizer step on a group for each of `prompts`, which divide into micro-batches of equal size."""
        at_once = min(self.settings.prompts_at_once, len(prompts))
        if len(prompts) % at_once:
            raise ValueError(f"{len(prompts)} prompts do not divide into micro-batches of {at_once}")
        micro_batches = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
        samples, rewards, total = [], [], 0.0
        for micro_batch in micro_batches:
            with self.timer.phase("rollout"):
                inputs = prepare(self.janus, self.processor, micro_batch)
                rollout = self.sample(micro_batch, inputs)
            with self.timer.phase("score"):
                scores = self.rewards(rollout).total
            with self.timer.phase("train"):
                advantages = normalised(scores, self.settings.group_size)
                loss = self._loss(rollout, inputs, advantages) / len(micro_batches)
                loss.backward()
                total += loss.item()
            samples.append(rollout)
            rewards.append(scores)
        with self.timer.phase("train"):
            nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return StepResult(join_groups(samples), torch.cat(rewards), total, self.timer.take())

    def loss_and_gradients(
        self, samples: Rollout, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The step's loss on given samples, with (n,) advantages, and the gradients of trained parameters by name."""
        at_once, size = self.settings.prompts_at_once, samples.group_size
        count = len(samples.prompts)
        total = torch.zeros((), device=advantages.device)
        for start in range(0, count, at_once):
            groups = range(start, min(start + at_once, count))
            part = take_groups(samples, groups)
            inputs = prepare(self.janus, self.processor, part.prompts)
            loss = self._loss(part, inputs, advantages[groups.start * size : groups.stop * size])
            loss = loss * len(groups) / count
            loss.backward()
            total += loss.detach()
        gradients = {name: weight.grad for name, weight in self.janus.named_parameters() if weight.requires_grad}
        self.optimizer.zero_grad()
        return total, gradients

    def _loss(self, rollout: Rollout, inputs: PlainInputs, advantages: torch.Tensor) -> torch.Tensor:
        """Image plus text, each the mean over the micro-batch's sequences."""
        tokens, lengths = rollout.texts.tokens, rollout.texts.lengths
        codes = rollout.images.tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        masks = torch.ones_like(codes, dtype=torch.bool), columns < lengths[:, None]

        def log_probs(janus: JanusForConditionalGeneration) -> tuple[torch.Tensor, torch.Tensor]:
            temperature = self.settings.temperature
            return (
                drawing_log_probs(janus, inputs.draw, codes, temperature),
                answer_log_probs(janus, inputs.ask, tokens, masks[1], temperature),
            )

        references = (None, None)
        if self.reference is not None:
            with self.timer.phase("reference"), torch.no_grad():
                references = log_probs(self.reference)
        parts = zip(log_probs(self.janus), masks, references, strict=True)
        return sum(policy_loss(own, mask, advantages, ref, self.settings.beta) for own, mask, ref in parts)


def normalised(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Advantages (n,): each group's rewards less their mean, over their standard deviation."""
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPSILON)).flatten()
