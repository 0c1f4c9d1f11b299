"""The CoRL objective on a packed micro-batch: GRPO on image tokens plus GRPO on text tokens, one backbone forward."""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import nn

from fastcorl.algorithm.external import exploration_advantages, mixture_log_probs
from fastcorl.records import LossRows, PackedBatch
from fastcorl_kernels import GRPOLoss, linear_grpo_loss, linear_selective_log_softmax

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")


class PackedModel(Protocol):
    """What the objective asks of a policy."""

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor: ...
    def image_head_input(self, hidden: torch.Tensor) -> torch.Tensor: ...

    text_head: nn.Linear
    image_head: nn.Linear


@dataclass(frozen=True)
class ObjectiveOptions:
    """The fields of the algorithm configuration that the loss reads; `guidance` w is used unless the policy is `cond`.

    `max_lengths` are the longest completions in tokens, by modality, for `dr_grpo`.
    """

    temperature: float
    guidance: float
    policy_logits: str
    loss_type: str
    importance: str
    eps_low: float | None
    eps_high: float | None
    beta: float
    max_lengths: dict[str, int]
    delta: float | None = None
    external_gamma: float = 1.0

    @property
    def guided(self) -> bool:
        return self.policy_logits != "cond" and self.guidance != 1


@dataclass(frozen=True)
class StepTotals:
    """Sizes of the whole optimizer step per modality, averaged over ranks: what micro-batch losses are divided by."""

    sequences: dict[str, float]
    tokens: dict[str, float]


class CoRLObjective(nn.Module):
    """Loss of one micro-batch. Summed over the micro-batches of a step and averaged over ranks it is the loss of the
    step: each modality normalised on its own, image plus text (CoRL eq. 6, the same advantage on both modalities).

    It owns the policy so that a training engine can wrap both in one module.
    """

    def __init__(self, policy: PackedModel, options: ObjectiveOptions):
        super().__init__()
        self.policy = policy
        self.options = options

    def forward(self, batch: PackedBatch, totals: StepTotals) -> tuple[torch.Tensor, dict[Modality, GRPOLoss]]:
        hidden = self.policy.hidden_states(batch)
        losses = {
            modality: self._loss(modality, rows, inputs, weight, bias, totals)
            for modality, rows, inputs, weight, bias in head_inputs(self.policy, hidden, batch, self.options)
        }
        loss = sum(result.loss for result in losses.values())
        # Ranks must run the same modules in the same micro-batch, whichever modality their packs happen to hold: ZeRO
        # gathers weights and reduces gradients module by module.
        if batch.image is None and totals.tokens["image"]:
            loss = loss + 0 * self.policy.image_head_input(hidden[:1]).sum()
        if batch.text is None and totals.tokens["text"]:
            loss = loss + 0 * self.policy.text_head.weight.sum()
        return loss, losses

    def _loss(
        self,
        modality: Modality,
        rows: LossRows,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        totals: StepTotals,
    ) -> GRPOLoss:
        options = self.options
        # The step's sizes instead of the micro-batch's, so that the sum over micro-batches is the step's loss.
        normalizer = totals.tokens[modality]
        if options.loss_type == "grpo":
            normalizer = totals.sequences[modality]
        elif options.loss_type == "dr_grpo":
            normalizer = totals.sequences[modality] * options.max_lengths[modality]
        settings = {"cu_seqlens": rows.cu_seqlens, "bias": bias, "temperature": options.temperature}
        settings |= {"normalizer": normalizer}
        external = None if rows.external is None else rows.external.repeat_interleave(rows.cu_seqlens.diff().long())
        own = linear_grpo_loss(
            hidden,
            weight,
            rows.targets,
            rows.advantages,
            mask=None if external is None else ~external,
            old_log_probs=rows.old_log_probs,
            ref_log_probs=rows.ref_log_probs,
            beta=options.beta,
            eps_low=options.eps_low,
            eps_high=options.eps_high,
            delta=options.delta,
            loss_type=options.loss_type,
            importance=options.importance,
            **settings,
        )
        if external is None:
            return own
        data = linear_grpo_loss(
            hidden,
            weight,
            rows.targets,
            exploration_advantages(rows.advantages, rows.cu_seqlens, rows.old_log_probs, options.external_gamma),
            mask=external,
            old_log_probs=mixture_log_probs(rows.old_log_probs, len(weight)),
            eps_low=None,
            eps_high=None,
            loss_type="dapo" if options.loss_type == "cispo" else options.loss_type,
            **settings,
        )
        log_probs = torch.where(external, data.log_probs, own.log_probs)
        return replace(own, loss=own.loss + data.loss, log_probs=log_probs)


def head_inputs(policy: PackedModel, hidden: torch.Tensor, batch: PackedBatch, options: ObjectiveOptions):
    """Yields (modality, rows, (R, hidden) head inputs, head weight, head bias) of a micro-batch's hidden states.

    Guidance is linear in logits and the last layer of the image head is linear, so guided logits come from a guided
    head input: no second logits tensor, no second product with the head.
    """
    if batch.image is not None:
        rows = batch.image
        inputs = policy.image_head_input(hidden.index_select(0, rows.positions))
        if options.guided:
            uncond = policy.image_head_input(hidden.index_select(0, rows.uncond_positions))
            if options.policy_logits == "cfg_detach_uncond":
                uncond = uncond.detach()
            # In float32: guidance multiplies rounding errors.
            inputs = uncond.float() + options.guidance * (inputs.float() - uncond.float())
        yield "image", rows, inputs, policy.image_head.weight, policy.image_head.bias
    if batch.text is not None:
        inputs = hidden.index_select(0, batch.text.positions)
        yield "text", batch.text, inputs, policy.text_head.weight, policy.text_head.bias


@torch.no_grad()
def packed_log_probs(
    policy: PackedModel, batch: PackedBatch, options: ObjectiveOptions
) -> dict[Modality, torch.Tensor]:
    """Teacher-forced log-probs (R,) float32 of a micro-batch's sampled tokens, by modality."""
    return {
        modality: linear_selective_log_softmax(hidden, weight, rows.targets, bias=bias, temperature=options.temperature)
        for modality, rows, hidden, weight, bias in head_inputs(policy, policy.hidden_states(batch), batch, options)
    }
