"""What a run is told. Strict pydantic models: unknown keys and out-of-range values are errors. Imports no torch."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fastcorl.config_base import Count, NonNegative, Positive, PositiveInt, Section, Switch
from fastcorl.config_data import DataConfig, check_columns
from fastcorl.config_rewards import RewardsConfig

BLOCK_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(Section):
    """Adapters on the backbone's linear layers (LoRA, arXiv 2106.09685) instead of training the whole backbone."""

    rank: Count = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: Positive = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: list[str] = Field(default_factory=lambda: list(BLOCK_LAYERS))
    """Layers of each block that get one."""

    @field_validator("targets")
    @classmethod
    def _targets_are_layers(cls, targets: list[str]) -> list[str]:
        for name in targets:
            if name not in BLOCK_LAYERS:
                raise ValueError(f"{name!r} is no linear layer of a block ({', '.join(BLOCK_LAYERS)})")
        if not targets:
            raise ValueError("must name at least one layer")
        return targets


class ModelConfig(Section):
    path: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format; "quickstart" is the shipped one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in forward and backward; the optimizer keeps float32 copies of bfloat16 weights."""
    gradient_checkpointing: bool | Count | Literal["auto"] = False
    """Recompute each block in backward to save memory. A number does so for the first so many blocks, "auto" for as
    many as a GPU's free memory asks for."""
    liger: Switch = "auto"
    """Liger's RMSNorm, RoPE and SwiGLU in the backbone, on CUDA; auto takes those that work there, and on a CPU ours,
    which keep less for backward than transformers'."""
    compile: bool = False
    """Compile the backbone's blocks with torch.compile, which makes the first step take a minute or more."""
    attention: Literal["auto", "flash_attn", "xformers", "torch", "flex", "sdpa"] = "auto"
    """What computes attention in packs; auto takes the first that works on the device, on a CPU sdpa."""
    lora: LoraConfig = LoraConfig()

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _text_is_read(cls, value: Any) -> Any:
        """From the command line; pydantic would take 1 for true."""
        if isinstance(value, str):
            known = {"true": True, "false": False}
            value = int(value) if value.isdecimal() else known.get(value.lower(), value)
        if not (isinstance(value, bool) or value == "auto" or (isinstance(value, int) and value >= 0)):
            raise ValueError(f"must be true, false, auto or a number of blocks, got {value!r}")
        return value

    @model_validator(mode="after")
    def _blocks_are_fused_once(self) -> "ModelConfig":
        if self.compile and self.liger == "on":
            raise ValueError("liger on and compile exclude one another: torch.compile fuses the same by itself")
        return self


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
    overlap: Switch = "auto"
    """Decode and score finished drawings while answers go on, in a thread that works on while the reference's log-probs
    are computed; auto does so on CUDA. Scores are the same."""


class AlgorithmConfig(Section):
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt; a group of one has no advantage."""
    policy_logits: Literal["cond", "cfg", "cfg_detach_uncond"] = "cond"
    """Which distribution is the policy: the conditional branch or the guided one."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "grpo"
    """What is averaged and clipped: a mean per sequence (grpo), per token of the step (dapo, bnpo), over a constant
    (dr_grpo, arXiv 2503.20783), or log-probs under clipped weights (cispo, arXiv 2506.13585)."""
    importance: Literal["token", "sequence"] = "token"
    """Ratio per token, or one per sequence (GSPO, arXiv 2507.18071)."""
    eps_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Clip range below 1; null is the paper's unclipped objective."""
    eps_high: Positive | None = None
    """Clip range above 1, given together with eps_low; cispo and delta need both."""
    delta: Positive | None = None
    """Upper bound of the unclipped ratio (two-sided clipping)."""
    beta: NonNegative = 0.0
    """Weight of the k3 KL term to the frozen reference."""
    num_iterations: PositiveInt = 1
    """Optimizer updates per rollout (mu)."""
    old_log_probs: Literal["recomputed", "sampled"] = "recomputed"
    """What ratios start from: log-probs of the first update's own forward, or those captured while sampling."""
    reference: Literal["keep", "offload", "swap"] = "keep"
    """Where the frozen reference of the KL term is: on the device, in host memory between uses, or in host memory and
    put in place of the trained weights while it is used. With adapters it is the model without them."""
    advantage_mode: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Normalise the weighted sum of the rewards in a group, or each reward (GDPO, arXiv 2601.05242)."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide by the group's standard deviation, or not (Dr. GRPO)."""
    dynamic_sampling: Count = 0
    """Rounds in which groups of equal rewards are replaced by other prompts' (DAPO, arXiv 2503.14476)."""
    token_budget: PositiveInt | None = None
    """Answer tokens that each step trains on, over all ranks: answers are taken at random until it is full, and the
    loss is divided by it (C3PO, arXiv 2506.14731). Needs loss_type dapo, bnpo or cispo."""
    external: bool = False
    """Each group gets one member from the data, the real image and the solution (RL-PLUS, arXiv 2508.00222)."""
    external_gamma: NonNegative = 1.0
    """Exponent of its weight (1 - probability)^gamma."""
    pair_similarity: bool = False
    """Multiply advantages by the data's column pair_similarity (PairUni, arXiv 2510.25682)."""

    @model_validator(mode="after")
    def _clip_range_is_whole(self) -> "AlgorithmConfig":
        if (self.eps_low is None) != (self.eps_high is None):
            raise ValueError("eps_low and eps_high must be given together, or both be null")
        if self.loss_type == "cispo" and self.eps_high is None:
            raise ValueError("loss_type cispo needs eps_low and eps_high")
        if self.delta is not None and self.eps_low is None:
            raise ValueError("delta needs eps_low and eps_high")
        if self.token_budget is not None and self.loss_type not in ("dapo", "bnpo", "cispo"):
            raise ValueError("token_budget divides the loss by tokens: loss_type must be dapo, bnpo or cispo")
        return self


class OptimizerConfig(Section):
    learning_rate: Positive = 4e-6
    """Peak of AdamW's learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: Positive = 1e-8
    """What AdamW adds to its denominator."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, of all trained weights."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up at the start of each stage."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to zero at the stage's end unless constant."""
    max_grad_norm: Positive = 1.0
    """Gradients of a longer norm are scaled down to it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a step whose loss or gradient is not finite on any rank. Its update is not made; skip goes on, for
    at most 3 such steps in a row."""


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
    """Show numbers and sample grids in TensorBoard, under the run's folder."""
    wandb: bool = False
    """The same in Weights & Biases; its own variables (WANDB_MODE, WANDB_ENTITY) say where."""
    trackio: bool = False
    """The same in trackio; TRACKIO_SPACE_ID shows it in a Space."""
    project: Annotated[str, Field(min_length=1)] = "fastcorl"
    """Project of wandb and trackio."""
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
    gradient_cosine: bool = False
    """Also log, at the steps of `every`, the cosine between the gradients of drawings and of answers. It takes memory
    for two float32 gradients, and a backward more; not under ZeRO 3."""

    @model_validator(mode="after")
    def _cosine_has_steps(self) -> "EvaluationConfig":
        if self.gradient_cosine and not self.every:
            raise ValueError("gradient_cosine is logged at the steps of `every`, which is 0")
        return self


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints inside a stage; 0 saves none. A finished stage is kept as its export."""
    keep: PositiveInt = 2
    """Newest checkpoints kept per run."""
    on_failure: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written, as on a full disk. Older ones stay as they were; continue says
    so in a line and tries again at the next, stop ends the run."""


class CompatConfig(Section):
    ulm_r1_image_shift: bool = False
    """Reproduce the public code's image log-probs, read one position too late."""


class StageConfig(Section):
    task: Literal["unified", "alternate", "t2i", "mm2t", "mc", "oe", "merge", "ordered"]
    """What the stage trains; `merge` joins stages, `ordered` trains several one after another."""
    init: str = "model"
    """Where the weights come from: "model", the name of an earlier stage, or a folder (with a / in it)."""
    steps: PositiveInt = 100
    """Optimizer steps, each on samples of its own."""
    prompts_per_step: PositiveInt = 16
    """Prompts per optimizer step, over all ranks."""
    data: str | None = None
    """Overrides data.train."""
    columns: dict[str, str] | None = None
    """Overrides data.columns."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Overrides algorithm.group_size."""
    learning_rate: Positive | None = None
    """Overrides optimizer.learning_rate."""
    beta: NonNegative | None = None
    """Overrides algorithm.beta."""
    merge: list[str] = Field(default_factory=list)
    """For task merge: the stages, or folders, whose weights are joined around `init`."""
    method: Literal["gaussian", "linear", "ties"] = "gaussian"
    """For task merge: Gaussian (arXiv 2501.10661, two stages), mean, or TIES (arXiv 2306.01708)."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """For method ties: fraction of each update's entries that is kept."""
    order: list[str] = Field(default_factory=list)
    """For task ordered: tasks (t2i, mm2t, mc, oe) to train for `steps` each, one after another."""
    probe_steps: Count = 0
    """For task ordered: steps per task that measure how much each harms the others, which decides the order
    (Omni-Thinker, arXiv 2507.14783); 0 keeps the order given."""

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        return None if columns is None else check_columns(columns)

    @model_validator(mode="after")
    def _lists_fit_the_task(self) -> "StageConfig":
        if (self.task == "merge") != bool(self.merge):
            raise ValueError("merge must name stages for task merge, and none for any other task")
        if self.task == "merge" and (len(self.merge) < 2 or (self.method == "gaussian" and len(self.merge) != 2)):
            raise ValueError(f"merge must name {'two' if self.method == 'gaussian' else 'at least two'} stages")
        if self.probe_steps and self.task != "ordered":
            raise ValueError("probe_steps is for task ordered")
        if (self.task == "ordered") != bool(self.order):
            raise ValueError("order must name tasks for task ordered, and none for any other task")
        for task in self.order:
            if task not in ("t2i", "mm2t", "mc", "oe") or self.order.count(task) > 1:
                raise ValueError(f"order: {task!r} must be one of t2i, mm2t, mc, oe, named once")
        return self


class Config(Section):
    name: str = "quickstart"
    """The run's folder is <output_dir>/<name>."""
    output_dir: str = "runs"
    """Folder of all runs; of several machines, one that all of them see."""
    seed: Annotated[int, Field(ge=0)] = 0
    """What prompts are chosen and tokens are sampled with."""
    resume: str | None = None
    """"auto" continues from the newest checkpoint of this run, a folder from that checkpoint."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 leaves it to OMP_NUM_THREADS, and without it shares the cores out among local ranks."""
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
    """What is trained, in this order; names are free."""

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
        if self.evaluation.gradient_cosine and self.deepspeed.zero_stage == 3:
            raise ValueError("evaluation.gradient_cosine: is not there under ZeRO 3, where no rank has whole gradients")
        earlier: list[str] = ["model"]
        for name, stage in self.stages.items():
            if name == "model" or not re.fullmatch(r"\w+", name):
                raise ValueError(f"stages.{name}: a stage's name has letters, digits and _, and is not 'model'")
            for source in [stage.init, *stage.merge]:
                if source not in earlier and "/" not in source:
                    raise ValueError(f"stages.{name}: {source!r} is not an earlier stage (one of {', '.join(earlier)})")
            earlier.append(name)
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        return self.model_dump(mode="json")
