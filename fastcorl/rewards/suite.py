"""All rewards of a run as one call: Rollout -> Scores."""

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from fastcorl.config import RewardsConfig
from fastcorl.plugins import load_object
from fastcorl.records import Rollout, Scores
from fastcorl.rewards.answers import AccuracyReward, FormatReward
from fastcorl.rewards.captioner import BlipCaptioner
from fastcorl.rewards.cycle import CycleReward
from fastcorl.rewards.perceptual import PerceptualReward, VQFeatures
from fastcorl.rewards.scene_graph import CaptionReward
from fastcorl.rewards.tim import Matcher, TIMReward


class Policy(Protocol):
    @property
    def janus(self) -> nn.Module:
        """A JanusForConditionalGeneration, of which `model.vqmodel.encoder` is read."""
        ...


class RewardSuite:
    """R = R_cycle + R_TIM + answer_weight (R_acc + R_format) + extras, in CoRL's unified stage (section 3.3).

    A rollout of one modality only, as in the refined stages, is scored by that modality's rewards, unweighted.
    The total is NaN where a reward with a nonzero weight could not be computed.
    """

    def __init__(
        self, config: RewardsConfig, policy: Policy, matcher: Matcher, *, captioner: BlipCaptioner | None = None
    ) -> None:
        """Without `captioner` the configured one is loaded at the first drawing, so text stages need none."""
        self.config = config
        self.policy = policy
        self.parse = load_object(config.caption_tuples, "rewards.caption_tuples")
        self.extras = {name: load_object(name, "rewards.extra") for name in config.extra}
        self.tim = TIMReward(matcher)
        self.accuracy = AccuracyReward()
        self.format = FormatReward()
        self._captioner = captioner

    @cached_property
    def cycle(self) -> CycleReward:
        encoder = self.policy.janus.model.vqmodel.encoder
        captioner = self._captioner or BlipCaptioner.from_pretrained(
            self.config.captioner, device=encoder.conv_in.weight.device
        )
        return CycleReward(PerceptualReward(VQFeatures(encoder)), CaptionReward(captioner, self.parse))

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Scores:
        """Parts: cycle, perceptual, caption and tim of drawings, accuracy and format of texts, extras by name."""
        if rollout.images is None and rollout.texts is None:
            raise ValueError("a rollout without images and texts cannot be scored")
        parts: dict[str, torch.Tensor] = {}
        weights: dict[str, float] = {}
        if rollout.images is not None:
            parts |= self.cycle.score(rollout)._asdict()
            parts["tim"] = self.tim(rollout)
            weights |= {"cycle": 1.0, "tim": 1.0}
        if rollout.texts is not None:
            parts |= {"accuracy": self.accuracy(rollout), "format": self.format(rollout)}
            weights |= dict.fromkeys(
                ("accuracy", "format"), 1.0 if rollout.images is None else self.config.answer_weight
            )
        device = next(iter(parts.values())).device
        parts |= {name: call_extra(name, function, rollout, device) for name, function in self.extras.items()}
        weights |= self.config.extra
        total = torch.zeros(rollout.num_rows, dtype=torch.float32, device=device)
        for name, weight in weights.items():
            # 0 * NaN is NaN: a reward that is only logged must not void a row
            if weight:
                total += weight * parts[name]
        return Scores(total, parts)


def call_extra(name: str, function: Callable, rollout: Rollout, device: torch.device) -> torch.Tensor:
    """A user's reward as (n,) float32: None and infinities become NaN, a wrong number of rows is a ValueError.

    Errors propagate: a failing reward must stop the run, not score 0.
    """
    values = function(rollout)
    if not isinstance(values, torch.Tensor):
        values = torch.tensor([float("nan") if value is None else float(value) for value in values])
    if values.shape != (rollout.num_rows,):
        raise ValueError(f"reward {name!r} returned shape {tuple(values.shape)} for {rollout.num_rows} rows")
    values = values.detach().to(device, torch.float32)
    return values.masked_fill(values.isinf(), torch.nan)
