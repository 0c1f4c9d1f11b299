"""Backward, gradient accumulation and optimizer step: DeepSpeed under a launcher, plain torch in a single process."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastcorl.config import DeepSpeedConfig, OptimizerConfig
from fastcorl.errors import UserError
from fastcorl.runtime.distributed import Distributed

STATE_FILE = "train_state.safetensors"


class TrainEngine(Protocol):
    """Drives one module whose forward returns a loss first. `module.policy` is the model that is trained."""

    def forward(self, *args: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def step(self, learning_rate: float) -> float:
        """Clip, update, clear gradients. Returns the gradient norm before clipping, the same on all ranks; where it is
        not finite nothing was updated, and a loss of any rank that was not finite makes it so."""
        ...

    def full_policy(self) -> nn.Module:
        """The policy with whole, current weights, for sampling and export. A collective call under ZeRO 3."""
        ...

    def save(self, folder: Path) -> None:
        """Write the state of training into `folder`, every rank its part. OSError where it cannot be written."""
        ...

    def load(self, folder: Path) -> None: ...
    def close(self) -> None: ...


def learning_rate_at(step: int, total_steps: int, peak: float, config: OptimizerConfig) -> float:
    """Learning rate of `step`, counted from 1: linear warm-up to `peak`, then the schedule."""
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant":
        return peak
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps + 1)
    return peak * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def engine_name(deepspeed: DeepSpeedConfig, *, launched: bool) -> str:
    """Which engine drives the run: "deepspeed" under a launcher or when it is configured, "plain" otherwise.

    Raises UserError when DeepSpeed is needed and does not import.
    """
    if not launched and not deepspeed.wanted:
        return "plain"
    try:
        import deepspeed as _  # noqa: F401
    except ImportError as error:
        raise UserError(f"deepspeed is needed for a launcher, ZeRO or deepspeed.config: {error}") from error
    return "deepspeed"


def make_engine(
    module: nn.Module, optimizer: OptimizerConfig, deepspeed: DeepSpeedConfig, ranks: Distributed, *, launched: bool
) -> TrainEngine:
    """DeepSpeed when a launcher started us or ZeRO is asked for, plain torch otherwise."""
    if engine_name(deepspeed, launched=launched) == "deepspeed":
        return _DeepSpeedEngine(module, optimizer, deepspeed, ranks)
    return _PlainEngine(module, optimizer)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over the state instead of ten, on a CPU too, and no temporaries
    )


class _PlainEngine:
    """One process, AdamW; low-precision weights are updated through float32 copies."""

    def __init__(self, module: nn.Module, config: OptimizerConfig):
        self.module = module
        self.max_grad_norm = config.max_grad_norm
        self.weights = _trained(module)
        self.masters = [
            weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for weight in self.weights
        ]
        self.optimizer = _adamw(self.masters, config)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        _telling(loss).backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight and weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def step(self, learning_rate: float) -> float:
        for master in self.masters:
            # A head that a stage does not use: AdamW then keeps the same state for it as DeepSpeed does.
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            return norm
        _set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if master is not weight:
                    weight.copy_(master)
        return norm

    def full_policy(self) -> nn.Module:
        return self.module.policy

    def save(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"master.{i}": master.detach() for i, master in enumerate(self.masters)}
        for i, master in enumerate(self.masters):
            for key, value in self.optimizer.state[master].items():
                tensors[f"{key}.{i}"] = value.detach().reshape(-1) if value.ndim == 0 else value.detach()
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_FILE)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(folder / STATE_FILE)
        with torch.no_grad():
            for i, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
                master.copy_(tensors[f"master.{i}"])
                if master is not weight:
                    weight.copy_(master)
                self.optimizer.state[master] = {
                    "step": tensors[f"step.{i}"].reshape(()).to(master.device),
                    "exp_avg": tensors[f"exp_avg.{i}"].to(master.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{i}"].to(master.device),
                }

    def close(self) -> None:
        self.optimizer = None


class _DeepSpeedEngine:
    """ZeRO 0 to 3. Accumulation boundaries are set by hand, since packing decides how many micro-batches a step has."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, deepspeed: DeepSpeedConfig, ranks: Distributed):
        import deepspeed as ds

        ds.logger.setLevel("WARNING")
        self.ds = ds
        self.zero_stage = deepspeed.zero_stage
        # Under ZeRO 3 the engine's weights are shards; sampling uses a whole copy that is refilled once per rollout.
        self.shadow = copy.deepcopy(module.policy).requires_grad_(False) if self.zero_stage == 3 else None
        if self.shadow is not None:
            self.shadow.lay_out()
        self.module = module
        trained = _trained(module)
        self.engine, self.optimizer, _, _ = ds.initialize(
            model=module,
            model_parameters=trained,
            optimizer=_adamw(trained, config),
            config=_deepspeed_json(deepspeed, config, ranks, trained[0].dtype),
            dist_init_required=False,
        )
        if self.zero_stage == 3:
            # The heads' weights are read outside their own modules' forward.
            for head in (module.policy.text_head, module.policy.image_head):
                for parameter in head.parameters():
                    ds.zero.register_external_parameter(module, parameter)

    def forward(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(_telling(loss))

    def step(self, learning_rate: float) -> float:
        _set_learning_rate(self.optimizer, learning_rate)
        if hasattr(self.optimizer, "_global_grad_norm"):
            # DeepSpeed's own optimizers look at the reduced norm first: not finite, they drop the gradients.
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        # torch's, in float32 without ZeRO, looks at nothing; the gradients are whole and reduced by now.
        gradients = [parameter.grad for parameter in _trained(self.module) if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def full_policy(self) -> nn.Module:
        if self.shadow is None:
            return self.module.policy
        with torch.no_grad():
            for shard, whole in zip(self.module.policy.parameters(), self.shadow.parameters(), strict=True):
                if shard.requires_grad:
                    with self.ds.zero.GatheredParameters([shard]):
                        whole.copy_(shard)
        return self.shadow

    def save(self, folder: Path) -> None:
        # Raised inside, a full disk of one rank would leave the others in a barrier of DeepSpeed's.
        with _errors_kept(self.engine.checkpoint_engine) as errors:
            self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        if errors:
            raise OSError(str(errors[0]))

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed", load_lr_scheduler_states=False)
        if path is None:
            raise UserError(f"resume: {folder} holds no DeepSpeed state")

    def close(self) -> None:
        self.engine.destroy()
        self.engine = self.optimizer = self.shadow = None


def _telling(loss: torch.Tensor) -> torch.Tensor:
    """The loss times 1, or times NaN if it is not finite: reduced gradients then tell every rank, and no host waits."""
    return loss * (1 + 0 * loss.detach())


@contextmanager
def _errors_kept(checkpoint_engine: Any) -> Iterator[list[Exception]]:
    """Inside the block `save` of DeepSpeed's writer appends what goes wrong to the list instead of raising it."""
    errors: list[Exception] = []
    save = checkpoint_engine.save

    def attempt(*args: Any, **options: Any) -> Any:
        try:
            return save(*args, **options)
        except (OSError, RuntimeError) as error:  # torch.save raises either where the disk is full
            errors.append(error)

    checkpoint_engine.save = attempt
    try:
        yield errors
    finally:
        del checkpoint_engine.save


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _deepspeed_json(
    config: DeepSpeedConfig, optimizer: OptimizerConfig, ranks: Distributed, dtype: torch.dtype
) -> dict[str, Any]:
    settings = config.settings()
    zero = settings.setdefault("zero_optimization", {})
    zero["stage"] = config.zero_stage
    zero.pop("compute_grad_norm", None)  # its norm says whether all is finite
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks.world_size,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return settings
