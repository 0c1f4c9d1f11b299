"""fastcorl's own step, whole or with one of its features switched off."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F

from fastcorl.algorithm import ObjectiveOptions, Packer, StepTotals
from fastcorl.model import Policy
from fastcorl.records import LossRows, PackedBatch, Rollout, StepRecord
from fastcorl.rollout import RolloutEngine
from fastcorl.trainer import Trainer
from fastcorl_kernels import GRPOLoss


class OurStep:
    """Steps of one trainer. `without(FEATURE)` gives the block in which a feature is off."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.policy: Policy = trainer.objective.policy
        self.steps = 0

    def step(self) -> tuple[StepRecord, Rollout]:
        self.steps += 1
        record, rollout, _ = self.trainer.train_step(self.steps)
        return record, rollout

    def without(self, feature: str | None) -> AbstractContextManager:
        return FEATURES[feature](self) if feature else nullcontext()

    def without_packing(self) -> AbstractContextManager:
        """One sequence in a micro-batch, which then shares its prompt with none."""
        return patch.object(self.trainer, "_pack", self._one_by_one)

    def without_prefix_sharing(self) -> AbstractContextManager:
        options = replace(self.trainer.pack_options, share_prefix=False)
        return patch.object(self.trainer, "pack_options", options)

    def without_vision_reuse(self) -> AbstractContextManager:
        """The vision tower runs again in the training forward, once for every answer of a pack."""
        images = [prompt.image for prompt in self.trainer.collector.prompts.take(1, 0, 1)]
        pixels = self.policy.preprocess(images)
        return patch.object(self.policy, "hidden_states", partial(hidden_states_from_pixels, self.policy, pixels))

    def without_mixed_rollout(self) -> AbstractContextManager:
        collector = self.trainer.collector
        return patch.object(collector, "engine", TwoCalls(collector.engine))

    def without_rewards_in_turn(self) -> AbstractContextManager:
        """With the overlap that is off on a CPU: rewards run beside sampling and one another. On a GPU the reverse."""
        collector = self.trainer.collector
        return patch.object(collector, "overlap", not collector.overlap)

    def without_fused_loss(self) -> AbstractContextManager:
        objective = self.trainer.objective
        return patch.object(objective, "_loss", partial(whole_logits_loss, objective.options))

    def _one_by_one(self, rollout: Rollout) -> list[PackedBatch]:
        packer = Packer(rollout, self.trainer.pack_options)
        return packer.pack(min_micro_batches=len(packer.sequences))


FEATURES = {
    "packing": OurStep.without_packing,
    "prefix sharing": OurStep.without_prefix_sharing,
    "vision reuse": OurStep.without_vision_reuse,
    "mixed rollout": OurStep.without_mixed_rollout,
    "rewards in turn": OurStep.without_rewards_in_turn,
    "fused loss": OurStep.without_fused_loss,
}


class TwoCalls:
    """A rollout engine that samples drawings and answers one after the other."""

    def __init__(self, engine: RolloutEngine):
        self.engine, self.policy = engine, engine.policy

    def generate(self, *args, draw: bool, answer: bool, **options) -> Rollout:
        drawings = self.engine.generate(*args, draw=True, answer=False, **options)
        answers = self.engine.generate(*args, draw=False, answer=True, **options)
        return replace(answers, images=drawings.images, draw_ids=drawings.draw_ids, uncond_ids=drawings.uncond_ids)


def hidden_states_from_pixels(policy: Policy, pixels: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """`Policy.hidden_states`, with vision features anew from the prompts' normalised `pixels` (P, 3, H, W)."""
    if batch.text is not None:
        size = policy.processor.num_image_tokens
        prompts = batch.vision_rows.view(-1, size)[:, 0] // size  # of the images in the pack
        count, answers = len(prompts), len(batch.text.advantages)
        features = policy.vision_features(pixels[prompts.repeat(-(-answers // count))[:answers]])
        rows = torch.arange(count * size, device=prompts.device)
        batch = replace(batch, vision_features=features[:count].flatten(0, 1), vision_rows=rows)
    return Policy.hidden_states(policy, batch)


def whole_logits_loss(
    options: ObjectiveOptions,
    modality: str,
    rows: LossRows,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    totals: StepTotals,
) -> GRPOLoss:
    """`CoRLObjective._loss` for the unclipped loss without KL, from a whole tensor of logits and torch's autograd."""
    log_probs = (F.linear(hidden, weight, bias) / options.temperature).log_softmax(-1)
    chosen = log_probs.gather(1, rows.targets[:, None]).squeeze(1)
    lengths = rows.cu_seqlens.diff().long()
    weights = (rows.advantages / (lengths * totals.sequences[modality])).repeat_interleave(lengths)
    loss = -(weights * (chosen - chosen.detach()).exp()).sum()
    zero = torch.zeros(())
    return GRPOLoss(loss, chosen.detach(), entropy=None, kl=None, clip_fraction=zero, ratio_max=zero + 1)
