"""Models, prompts and configurations of the step benchmarks: a unified step as trainer and baseline are told it."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from bench.baselines.plain_rewards import plain_rewards
from bench.baselines.plain_trainer import PlainSettings, PlainTrainer
from bench.rollout_problems import SIZES, make_policy
from fastcorl.config import Config
from fastcorl.data import PromptData, load_rows
from fastcorl.model import Policy, load_policy
from fastcorl.model.loading import speed_up
from fastcorl.records import Prompt
from fastcorl.rewards import RewardModels
from fastcorl.runtime.distributed import Distributed
from fastcorl.trainer import Trainer

STAGE = "unified"


@dataclass(frozen=True)
class StepProblem:
    """A unified step on `prompts` prompts, `group_size` drawings and answers each.

    The quickstart's answers end by themselves; those of a model with random weights do not. Our step without its
    features is part of the first `feature_rounds` rounds only, or of none. The plain trainer's micro-batches all take
    equally long: where `baseline_prompts` are fewer, its time is that of these, times as many as there are.
    """

    model: str
    prompts: int
    group_size: int
    guidance: float
    max_new_tokens: int
    pack_tokens: int
    rounds: int
    feature_rounds: int
    baseline_prompts: int | None = None
    kv_cache_tokens: int | None = None
    device: str = "cpu"

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    def policy(self) -> Policy:
        if self.model not in SIZES:
            return load_policy(self.model)
        policy = make_policy(self.model, self.device)
        policy.lay_out()
        policy.janus.generation_config.eos_token_id = None
        return policy

    def make_prompts(self) -> list[Prompt]:
        rows = PromptData(load_rows("fastcorl.quickstart.data:train"))
        prompts = [rows[index] for index in range(self.prompts)]
        repeats = SIZES[self.model].repeats if self.model in SIZES else 1
        return [replace(prompt, question=" ".join([prompt.question] * repeats)) for prompt in prompts]

    def config(self, **packing) -> Config:
        packing = {"tokens": self.pack_tokens, **packing}
        return Config(
            rollout={
                "guidance": self.guidance,
                "max_new_tokens": self.max_new_tokens,
                "kv_cache_tokens": self.kv_cache_tokens,
            },
            algorithm={"group_size": self.group_size},
            packing=packing,
            stages={STAGE: {"task": "unified", "prompts_per_step": self.prompts}},
        )

    def trainer(self, policy: Policy, **packing) -> Trainer:
        """Ours, on `policy`, which gets the modules that a run takes by default."""
        speed_up(policy.backbone, "auto")
        config = self.config(**packing)
        return Trainer(
            config,
            STAGE,
            config.stages[STAGE],
            policy,
            RewardModels(config.rewards, policy.device),
            FixedPrompts(self.make_prompts()),
            Distributed(0, 1, policy.device),
            launched=False,
        )

    def baseline(self, policy: Policy) -> PlainTrainer:
        """The plain trainer, on a copy of the policy's model."""
        janus = deepcopy(policy.janus)
        janus.set_attn_implementation("sdpa")
        optimizer = self.config().optimizer
        settings = PlainSettings(
            group_size=self.group_size,
            guidance=self.guidance,
            max_new_tokens=self.max_new_tokens,
            learning_rate=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
        )
        rewards = plain_rewards(self.config().rewards, janus, policy.processor)
        return PlainTrainer(janus, policy.processor, rewards, settings)


PROBLEMS = {
    "quickstart": StepProblem(
        "quickstart", 8, 8, guidance=1.0, max_new_tokens=56, pack_tokens=1024, rounds=3, feature_rounds=2
    ),
    "91M": StepProblem("91M", 1, 4, guidance=5.0, max_new_tokens=48, pack_tokens=512, rounds=2, feature_rounds=0),
    "Janus-Pro-1B": StepProblem(
        "Janus-Pro-1B",
        16,
        8,
        guidance=5.0,
        max_new_tokens=512,
        pack_tokens=8192,
        rounds=1,
        feature_rounds=1,
        baseline_prompts=2,
        kv_cache_tokens=65536,
        device="cuda",
    ),
}


class FixedPrompts:
    """The same prompts in every step."""

    def __init__(self, prompts: list[Prompt]):
        self.prompts = prompts

    def take(self, step: int, rank: int, world: int) -> Sequence[Prompt]:
        return self.prompts
