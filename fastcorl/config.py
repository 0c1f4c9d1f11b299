"""What a run is told. Strict pydantic models: unknown keys and out-of-range values are errors. Imports no torch."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
COLUMNS = ("prompt", "real_image", "qa_problem", "qa_solution", "qa_type")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"takes no true or false, got {str(value).lower()}")
        return value


class ModelConfig(Section):
    path: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format; "quickstart" is the shipped one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in forward and backward; the optimizer keeps float32 copies of bfloat16 weights."""
    gradient_checkpointing: bool = False
    """Recompute each block in backward to save memory."""


class DataConfig(Section):
    train: str = "fastcorl.quickstart.data:train"
    """Training rows: `module:function`, or a local parquet, jsonl or saved data set."""
    held_out: str = "fastcorl.quickstart.data:held_out"
    """Rows for evaluation, in the same forms."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: our column (prompt, real_image, qa_problem, qa_solution, qa_type) to the data set's."""
    question_template: str = "{question}"
    """Text put around each question; must contain {question}."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest caption or question, image features included, in tokens."""

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"{name!r} is none of our columns ({', '.join(COLUMNS)})")
        return columns

    @field_validator("question_template")
    @classmethod
    def _template_has_place(cls, template: str) -> str:
        try:
            filled = template.format(question="\0")
        except (LookupError, ValueError):
            raise ValueError("must have no braces but those of {question}") from None
        if "\0" not in filled:
            raise ValueError("must contain {question}")
        return template


class RolloutConfig(Section):
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in training alike."""
    guidance: NonNegative = 5.0
    """Weight w of classifier-free guidance, u + w (c - u), for drawings; 1 samples the conditional branch alone."""
    max_new_tokens: PositiveInt = 512
    """Longest answer in tokens."""
    top_k: PositiveInt | None = None
    """Draw from the k most likely tokens only; training still sees the whole distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the fewest most likely tokens that have together this probability."""
    max_rows: PositiveInt | None = None
    """Rows decoded side by side on each rank, two per guided drawing; null decodes all at once."""
    kv_cache_tokens: PositiveInt | None = None
    """Tokens that the KV cache of a rank holds at once; null holds what the step needs."""


class AlgorithmConfig(Section):
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt; a group of one has no advantage."""
    policy_logits: Literal["cond", "cfg", "cfg_detach_uncond"] = "cond"
    """Which distribution is the policy: the conditional branch or the guided one."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "grpo"
    importance: Literal["token", "sequence"] = "token"
    eps_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Clip range below 1; null is the paper's unclipped objective."""
    eps_high: Positive | None = None
    """Clip range above 1."""
    beta: NonNegative = 0.0
    """Weight of the k3 KL term to the frozen reference."""
    num_iterations: PositiveInt = 1
    """Optimizer updates per rollout (mu)."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide by the group's standard deviation, or not (Dr. GRPO)."""

    @model_validator(mode="after")
    def _clip_range_is_whole(self) -> "AlgorithmConfig":
        if (self.eps_low is None) != (self.eps_high is None):
            raise ValueError("eps_low and eps_high must be given together, or both be null")
        if self.loss_type == "cispo" and self.eps_high is None:
            raise ValueError("loss_type cispo needs eps_low and eps_high")
        return self


class RewardsConfig(Section):
    answer_weight: NonNegative = 0.8
    """Lambda of the unified reward: weight of accuracy and format."""
    captioner: str = "quickstart"
    """BLIP that recaptions drawings: a folder or hub name; "quickstart" is the shipped one."""
    caption_tuples: str = "fastcorl.quickstart.grammar:scene_tuples"
    """`module:function` from a caption to its set of scene-graph tuples."""
    extra: dict[str, float] = Field(default_factory=dict)
    """More rewards by `module:function`, with their weights."""


class OptimizerConfig(Section):
    learning_rate: Positive = 4e-6
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up at the start of each stage."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to zero at the stage's end unless constant."""
    max_grad_norm: Positive = 1.0


class PackingConfig(Section):
    tokens: PositiveInt = 16384
    """Most tokens in one packed micro-batch."""
    share_prefix: bool = True
    """A group's prompt stands in a pack once; its completions attend to it. The same numbers for fewer tokens."""


class DeepSpeedConfig(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage; null takes the one of `config`, or 0."""
    config: str | None = None
    """A DeepSpeed JSON file to start from; sizes, optimizer and precision are filled in from this configuration."""

    @model_validator(mode="after")
    def _file_is_json_and_agrees(self) -> "DeepSpeedConfig":
        stage = self.settings().get("zero_optimization", {}).get("stage")
        if stage is not None and self.zero_stage not in (None, stage):
            raise ValueError(f"zero_stage is {self.zero_stage}, but {self.config} says {stage}")
        self.zero_stage = stage or 0 if self.zero_stage is None else self.zero_stage
        return self

    def settings(self) -> dict[str, Any]:
        """The content of the JSON file, if there is one."""
        if self.config is None:
            return {}
        try:
            settings = json.loads(Path(self.config).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {self.config!r}: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{self.config!r} does not hold a JSON object")
        return settings

    @property
    def wanted(self) -> bool:
        """Whether DeepSpeed is asked for even in a single process."""
        return self.config is not None or bool(self.zero_stage)


class LoggingConfig(Section):
    tensorboard: bool = True
    samples_every: Annotated[int, Field(ge=0)] = 50
    """Steps between sample grids; 0 turns them off."""
    num_samples: PositiveInt = 8
    """Prompts shown in a grid."""


class EvaluationConfig(Section):
    scorer: str | None = "fastcorl.quickstart.scorer:Scorer"
    """`module:class` of the independent scorer; null evaluates answers only."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations inside a stage; 0 evaluates before the first and after each stage only."""
    num_prompts: PositiveInt = 128
    """Held-out prompts per evaluation."""
    guidance: NonNegative | None = None
    """Guidance of evaluated drawings; null takes the rollout's."""


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints inside a stage; 0 saves none. A finished stage is kept as its export."""
    keep: PositiveInt = 2
    """Newest checkpoints kept per run."""


class CompatConfig(Section):
    ulm_r1_image_shift: bool = False
    """Reproduce the public code's image log-probs, read one position too late."""


class StageConfig(Section):
    task: Literal["unified", "alternate", "t2i", "mm2t", "mc", "oe", "merge"]
    """What the stage trains; `merge` joins the stages named in `merge`."""
    init: str = "model"
    """Where the weights come from: "model" or the name of an earlier stage."""
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    """Prompts per optimizer step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Overrides algorithm.group_size."""
    learning_rate: Positive | None = None
    """Overrides optimizer.learning_rate."""
    beta: NonNegative | None = None
    """Overrides algorithm.beta."""
    merge: list[str] = Field(default_factory=list)
    """For task merge: the two stages whose weights are joined (Gaussian merge around `init`)."""

    @model_validator(mode="after")
    def _merge_names_two(self) -> "StageConfig":
        if (self.task == "merge") != (len(self.merge) == 2):
            raise ValueError("merge must name two stages for task merge, and none for any other task")
        return self


class Config(Section):
    name: str = "quickstart"
    """The run's folder is <output_dir>/<name>."""
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    resume: str | None = None
    """"auto" continues from the newest checkpoint of this run, a folder from that checkpoint."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 shares the cores out among the local ranks."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rewards: RewardsConfig = RewardsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    packing: PackingConfig = PackingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compat: CompatConfig = CompatConfig()
    stages: dict[str, StageConfig]

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name) or set(name) == {"."}:
            raise ValueError("must be the name of a folder: letters, digits, _ - and .")
        return name

    @model_validator(mode="after")
    def _stages_follow_one_another(self) -> "Config":
        if not self.stages:
            raise ValueError("stages: must name at least one stage")
        earlier: list[str] = ["model"]
        for name, stage in self.stages.items():
            if name == "model" or not re.fullmatch(r"\w+", name):
                raise ValueError(f"stages.{name}: a stage's name has letters, digits and _, and is not 'model'")
            for source in [stage.init, *stage.merge]:
                if source not in earlier:
                    raise ValueError(f"stages.{name}: {source!r} is not an earlier stage (one of {', '.join(earlier)})")
            earlier.append(name)
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        return self.model_dump(mode="json")
