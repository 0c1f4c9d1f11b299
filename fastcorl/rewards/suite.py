"""All rewards of a stage as one call: Rollout -> Scores."""

from typing import Protocol

import torch
from torch import nn

from fastcorl.config_rewards import ANSWER_REWARDS, RewardsConfig
from fastcorl.records import Rollout, Scores
from fastcorl.rewards.answers.rules import AccuracyReward, FormatReward
from fastcorl.rewards.captions.captioner import Captioner
from fastcorl.rewards.cycle import CaptionReward, CycleReward
from fastcorl.rewards.images.clip_score import ClipReward
from fastcorl.rewards.images.perceptual import PerceptualReward, make_image_similarity
from fastcorl.rewards.models import RewardModels
from fastcorl.rewards.scaling import Reward, Scaled
from fastcorl.rewards.tim import Matcher, TIMReward


class Policy(Protocol):
    @property
    def janus(self) -> nn.Module:
        """A JanusForConditionalGeneration, of which `model.vqmodel.encoder` is read."""
        ...


class RewardSuite:
    """R = R_cycle + R_TIM + answer_weight (R_acc + R_format) + extras, in CoRL's unified stage (section 3.3), each with
    its own weight and scale.

    A rollout of one modality only, as in the refined stages, is scored by that modality's rewards, without
    `answer_weight`. The total is NaN where a reward with a nonzero weight could not be computed.
    """

    def __init__(
        self,
        config: RewardsConfig,
        models: RewardModels,
        policy: Policy,
        matcher: Matcher,
        *,
        captioner: Captioner | None = None,
    ) -> None:
        """`captioner` recaptions where `models` has none."""
        self.config, self.models = config, models
        self.cycle: CycleReward | None = None
        self.drawing_rewards: dict[str, Reward] = {}
        perceptual = caption = None
        if config.image_measure:
            similarity = models.image_similarity or make_image_similarity(
                "vq", vq_encoder=policy.janus.model.vqmodel.encoder
            )
            perceptual = self._scaled("perceptual", PerceptualReward(similarity))
        if models.caption_similarities:
            caption = CaptionReward(
                models.captioner or captioner,
                models.caption_similarities,
                unit=self._scaling("caption") == "unit",
            )
        if config.weight("cycle"):
            self.cycle = CycleReward(perceptual, caption, halve=self._scaling("cycle") == "unit")
        elif perceptual is not None:
            self.drawing_rewards["perceptual"] = perceptual
        if config.weight("caption") and self.cycle is None:
            self.drawing_rewards["caption"] = caption
        if config.weight("tim"):
            self.drawing_rewards["tim"] = self._scaled("tim", TIMReward(matcher))
        if models.clip is not None:
            self.drawing_rewards["clip"] = self._scaled("clip", ClipReward(models.clip))
        self.answer_rewards = {"accuracy": AccuracyReward(config.accuracy), "format": FormatReward()}

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Scores:
        """Parts: cycle, perceptual, caption, tim, clip of drawings, accuracy and format of texts, extras by name.

        The user's functions run at the same time as the rest.
        """
        if rollout.images is None and rollout.texts is None:
            raise ValueError("a rollout without images and texts cannot be scored")
        users = self.models.users
        users.start(rollout)
        parts: dict[str, torch.Tensor] = {}
        if rollout.images is not None:
            if self.cycle is not None:
                parts |= self.cycle.parts(rollout)
            parts |= {name: reward(rollout) for name, reward in self.drawing_rewards.items()}
        if rollout.texts is not None:
            parts |= {name: reward(rollout) for name, reward in self.answer_rewards.items()}
        samples = rollout.images or rollout.texts
        device = samples.tokens.device
        results = users.collect()
        parts |= {name: result.values.to(device) for name, result in results.items()}
        weights = {name: weight for name in parts if (weight := self._weight(name, unified=self._unified(rollout)))}
        total = torch.zeros(rollout.num_rows, dtype=torch.float32, device=device)
        for name, weight in weights.items():
            total += weight * parts[name]
        failures = {name: result.failure for name, result in results.items() if result.failure}
        return Scores(total, parts, weights, failures)

    @staticmethod
    def _unified(rollout: Rollout) -> bool:
        return rollout.images is not None and rollout.texts is not None

    def _weight(self, name: str, *, unified: bool) -> float:
        config = self.config
        if name in config.extra or name in config.pairwise:
            return (config.extra | config.pairwise)[name]
        return config.weight(name) * (config.answer_weight if unified and name in ANSWER_REWARDS else 1.0)

    def _scaling(self, name: str) -> str:
        return self.config.scaling_of.get(name, self.config.scaling)

    def _scaled(self, name: str, reward: Reward) -> Reward:
        return Scaled(reward) if self._scaling(name) == "unit" else reward
