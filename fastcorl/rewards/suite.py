"""All rewards of a stage as one call: Rollout -> Scores."""

from functools import partial
from typing import Protocol

import torch
from torch import nn

from fastcorl.config_rewards import ANSWER_REWARDS, RewardsConfig
from fastcorl.records import Rollout, Scores
from fastcorl.rewards.answers.rules import AccuracyReward, FormatReward
from fastcorl.rewards.background import Background, Job
from fastcorl.rewards.captions.captioner import Captioner
from fastcorl.rewards.cycle import CaptionReward, cycle_reward
from fastcorl.rewards.images.clip_score import ClipReward
from fastcorl.rewards.images.perceptual import PerceptualReward, make_image_similarity
from fastcorl.rewards.models import RewardModels
from fastcorl.rewards.scaling import Reward, Scaled
from fastcorl.rewards.tim import Matcher, TIMReward
from fastcorl.rewards.users.rewards import Result


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
        self.drawing_rewards: dict[str, Reward] = {}
        if config.image_measure:
            similarity = models.image_similarity or make_image_similarity(
                "vq", vq_encoder=policy.janus.model.vqmodel.encoder
            )
            self.drawing_rewards["perceptual"] = self._scaled("perceptual", PerceptualReward(similarity))
        if models.caption_similarities:
            self.drawing_rewards["caption"] = CaptionReward(
                models.captioner or captioner,
                models.caption_similarities,
                unit=self._scaling("caption") == "unit",
            )
        if config.weight("tim"):
            self.drawing_rewards["tim"] = self._scaled("tim", TIMReward(matcher))
        if models.clip is not None:
            self.drawing_rewards["clip"] = self._scaled("clip", ClipReward(models.clip))
        # Judged by the policy's trained weights, so in the caller's thread.
        self.by_policy = {"tim"} if models.captioner is not None else {"tim", "caption"}
        self.answer_rewards = {"accuracy": AccuracyReward(config.accuracy), "format": FormatReward()}

    def __call__(self, rollout: Rollout) -> Scores:
        """Parts: cycle, perceptual, caption, tim, clip of drawings, accuracy and format of texts, extras by name.

        The user's functions run at the same time as the rest.
        """
        scoring = self.begin()
        scoring.start(rollout)
        return scoring.result()

    def begin(self, *, overlap: bool = False) -> "Scoring":
        """The scores of a rollout to come; with `overlap` some are computed beside what the caller does meanwhile."""
        return Scoring(self, self.models.background if overlap else None)

    def join(self, rollout: Rollout, found: dict[str, torch.Tensor], results: dict[str, Result]) -> Scores:
        """The scores of a rollout from its own rewards, in any order, and the `results` of the user's."""
        parts: dict[str, torch.Tensor] = {}
        if rollout.images is not None and self.config.weight("cycle"):
            halve = self._scaling("cycle") == "unit"
            parts["cycle"] = cycle_reward(found["perceptual"], found["caption"], halve=halve)
        parts |= {name: found[name] for name in (*self.drawing_rewards, *self.answer_rewards) if name in found}
        parts |= {name: result.values.to(rollout.device) for name, result in results.items()}
        weights = {name: weight for name in parts if (weight := self._weight(name, unified=self._unified(rollout)))}
        total = torch.zeros(rollout.num_rows, dtype=torch.float32, device=rollout.device)
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


class Scoring:
    """The scores of one rollout: `see_drawings` where these are there before the rest, `start` with all of it, and
    `result` when the scores are needed.

    With a `background` drawings are judged there from the first of these calls on, but for what needs the policy's
    trained weights. The rewards see the same as without.
    """

    def __init__(self, suite: RewardSuite, background: Background | None) -> None:
        self.suite, self.background = suite, background
        self._rollout: Rollout | None = None
        self._found: dict[str, torch.Tensor] = {}
        self._job: Job | None = None

    @property
    def hidden_seconds(self) -> float:
        """How long the background worked while nobody waited for it."""
        return max(0.0, self._job.seconds - self._job.waited) if self._job is not None else 0.0

    def see_drawings(self, rollout: Rollout) -> None:
        """Begin with the drawings of a rollout, which need not have its answers yet. Needs a background."""
        rewards, here = self.suite.drawing_rewards, self.suite.by_policy
        work = {name: partial(reward, rollout) for name, reward in rewards.items() if name not in here}
        self._job = self.background.start(work, rollout.device)

    @torch.no_grad()
    def start(self, rollout: Rollout) -> None:
        """Compute what needs the policy; without a background all but the user's functions, which begin here."""
        if rollout.images is None and rollout.texts is None:
            raise ValueError("a rollout without images and texts cannot be scored")
        suite, self._rollout = self.suite, rollout
        suite.models.users.start(rollout)
        rewards: dict[str, Reward] = {}
        if rollout.images is not None:
            if self.background is not None and self._job is None:
                self.see_drawings(rollout)
            here = suite.drawing_rewards if self.background is None else suite.by_policy
            rewards |= {name: reward for name, reward in suite.drawing_rewards.items() if name in here}
        if rollout.texts is not None:
            rewards |= suite.answer_rewards
        self._found = {name: reward(rollout) for name, reward in rewards.items()}

    def result(self) -> Scores:
        """Wait for what is still being computed."""
        found = self._found | (self._job.result() if self._job is not None else {})
        return self.suite.join(self._rollout, found, self.suite.models.users.collect())
