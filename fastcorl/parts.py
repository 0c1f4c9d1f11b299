"""The parts of a stage, made from the configuration."""

import torch

from fastcorl.algorithm import ObjectiveOptions, PackOptions
from fastcorl.config import Config, StageConfig
from fastcorl.model import Policy
from fastcorl.rewards import Matcher, PolicyCaptioner, RewardModels, RewardSuite
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.runtime.reference import Reference
from fastcorl.tasks import TASKS

CAPTION_TOKENS = 40


def kl_weight(config: Config, stage: StageConfig) -> float:
    """Beta of a stage."""
    return config.algorithm.beta if stage.beta is None else stage.beta


def needs_reference(config: Config, stage: StageConfig) -> bool:
    """Whether a stage needs the policy that it started from."""
    return bool(kl_weight(config, stage)) or matches_frozen(config, stage)


def matches_frozen(config: Config, stage: StageConfig) -> bool:
    """Whether a stage's matching reward is the start policy's."""
    rewards = config.rewards
    return rewards.tim == "frozen" and bool(rewards.weight("tim")) and TASKS[stage.task].draws


def liger_choice(config: Config) -> str:
    """Whether the backbone takes Liger's kernels; they allow no second backward."""
    choice = config.model.liger
    return "off" if choice == "auto" and config.evaluation.gradient_cosine else choice


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


def overlaps(config: Config, device: torch.device) -> bool:
    """Whether rewards are computed beside sampling and the reference's log-probs."""
    overlap = config.rollout.overlap
    return device.type == "cuda" if overlap == "auto" else overlap == "on"


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
        beta=kl_weight(config, stage),
        max_lengths={"image": num_image_tokens, "text": config.rollout.max_new_tokens},
        delta=algorithm.delta,
        external_gamma=algorithm.external_gamma,
    )


def pack_options(config: Config, *, guided: bool) -> PackOptions:
    """How a run packs; `guided` as in `ObjectiveOptions`."""
    return PackOptions(
        tokens=config.packing.tokens,
        guided=guided,
        image_shift=config.compat.ulm_r1_image_shift,
        share_prefix=config.packing.share_prefix,
    )
