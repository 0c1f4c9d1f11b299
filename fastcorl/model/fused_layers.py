"""Faster blocks for a Llama backbone: Liger's kernels on CUDA, or the blocks as torch.compile makes them.

Only the modules of the one backbone change (`block_classes.py`); wrapped linear layers (adapters) are called as before.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from fastcorl.errors import UserError
from fastcorl.model.block_classes import GatedMLP, RotaryAttention, attend, projections, take_on

DEVICE = "cuda"
TOLERANCE = 0.02  # of the norm: rounding to bfloat16 is within 0.01
POSITIONS = 37  # that a kernel is tried on

logger = logging.getLogger(__name__)


@functools.cache
def _liger() -> Any:
    """Liger's operators, from the package that an implementation for the device may have replaced some in."""
    import liger_kernel.ops

    return liger_kernel.ops


def liger_rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float, *, in_place: bool) -> torch.Tensor:
    """(.., H) states, (H,) weight -> (.., H). `in_place`: backward writes over the gradient that it is given."""
    return _liger().LigerRMSNormFunction.apply(states, weight, eps, 0.0, "llama", in_place)


def liger_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, heads, L, D) query and (B, kv_heads, L, D) key, turned by (B, L, D) angles. What lies in memory as
    (B, L, heads, D) is written over, and so are its gradients in backward."""
    return _liger().LigerRopeFunction.apply(query, key, cos, sin)


class LigerSwiGLU(torch.autograd.Function):
    """silu(gate) * up of (.., I) tensors by Liger, whose backward writes both gradients over gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.spent = False
        return _liger().swiglu_forward(gate, up)[2]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Triton's writes do not show in a tensor's version, so autograd would not notice.
        if ctx.spent:
            raise RuntimeError("Liger's SwiGLU has no second backward: its first wrote over what it had saved")
        ctx.spent = True
        gate, up = (saved.view(-1, saved.shape[-1]) for saved in ctx.saved_tensors)
        return _liger().swiglu_backward(gate, up, gradient.contiguous())


class LigerNorm(LlamaRMSNorm):
    # Inside a block the gradient is a sum made for this module alone.
    in_place = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=self.in_place)


class LigerAttention(RotaryAttention):
    rotary = staticmethod(liger_rotary)


class LigerMLP(GatedMLP):
    gated = LigerSwiGLU.apply


CLASSES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "RMSNorm": (LlamaRMSNorm, LigerNorm),
    "RoPE": (LlamaAttention, LigerAttention),
    "SwiGLU": (LlamaMLP, LigerMLP),
}


def use_liger(backbone: nn.Module, choice: str) -> None:
    """Have a Llama backbone run on those of Liger's kernels that work where its weights are: "auto", or "on", which
    needs all of them.

    Raises:
        UserError: the choice is "on", and a kernel does not work here.
    """
    weight, config = backbone.norm.weight, backbone.config
    if weight.device.type == DEVICE:
        shape = Shape(
            weight.dtype,
            weight.device,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            backbone.layers[0].self_attn.head_dim,
            config.rms_norm_eps,
            config.hidden_act,
        )
        working, reasons = working_kernels(shape)
    else:
        working, reasons = (), (f"the weights are on {weight.device.type}, not on {DEVICE}",)
    if choice == "on" and reasons:
        raise UserError(f"model.liger: on does not work here: {'; '.join(reasons)}")
    parts = f"Liger's {', '.join(working)}" if working else "torch's modules"
    level = logging.WARNING if reasons and weight.device.type == DEVICE else logging.INFO
    logger.log(level, "the backbone runs on %s%s", parts, f" ({'; '.join(reasons)})" if reasons else "")
    take_on(backbone, dict(CLASSES[name] for name in working))
    backbone.norm.in_place = False  # what comes after the backbone may keep its gradient


def uses_liger(backbone: nn.Module) -> bool:
    """Whether the parts that autograd keeps the most of are Liger's."""
    return isinstance(backbone.norm, LigerNorm) and isinstance(backbone.layers[0].mlp, LigerMLP)


class Shape(NamedTuple):
    """What decides whether the kernels work."""

    dtype: torch.dtype
    device: torch.device
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str


@functools.cache
def working_kernels(shape: Shape) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which kernels import, run and agree with torch on this device, forward and backward; and why others do not."""
    working, reasons = [], []
    for name, trial in TRIALS.items():
        try:
            # The caller may have turned gradients off.
            with torch.inference_mode(False), torch.enable_grad():
                error = trial(shape)
        except Exception as problem:  # Triton's and its compilers' have no common base
            reasons.append(f"{name}: {type(problem).__name__}: {problem}".splitlines()[0])
            continue
        if error < TOLERANCE:
            working.append(name)
        else:
            reasons.append(f"{name}: it is off by {error:.2g} of what torch gives")
    return tuple(working), tuple(reasons)


def _try_norm(shape: Shape) -> float:
    return _error(
        lambda states, weight: (liger_rms_norm(states, weight, shape.eps, in_place=False),),
        lambda states, weight: (F.rms_norm(states, (shape.width,), weight, shape.eps),),
        shape,
        (1, POSITIONS, shape.width),
        (shape.width,),
    )


def _try_rotary(shape: Shape) -> float:
    angles = torch.linspace(0, 7, POSITIONS * shape.head_dim // 2, device=shape.device).view(1, POSITIONS, -1)
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)

    def turned(rotary: Callable, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Copies, since Liger writes over its arguments.
        query, key = (each.clone().transpose(1, 2) for each in states)
        return rotary(query, key, cos.to(query.dtype), sin.to(query.dtype))

    return _error(
        functools.partial(turned, liger_rotary),
        functools.partial(turned, apply_rotary_pos_emb),
        shape,
        (1, POSITIONS, shape.heads, shape.head_dim),
        (1, POSITIONS, shape.kv_heads, shape.head_dim),
    )


def _try_swiglu(shape: Shape) -> float:
    if shape.activation not in ("silu", "swish"):
        raise TypeError(f"the activation is {shape.activation}")
    return _error(
        lambda gate, up: (LigerSwiGLU.apply(gate.clone(), up.clone()),),
        lambda gate, up: (F.silu(gate) * up,),
        shape,
        (1, POSITIONS, shape.intermediate),
        (1, POSITIONS, shape.intermediate),
    )


TRIALS: dict[str, Callable[[Shape], float]] = {"RMSNorm": _try_norm, "RoPE": _try_rotary, "SwiGLU": _try_swiglu}


def _error(fused: Callable, plain: Callable, shape: Shape, *sizes: tuple[int, ...]) -> float:
    """Largest relative error of outputs and gradients of `fused` against `plain` in float32; may be NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(shape.device, shape.dtype)

    leaves = [normal(size) for size in sizes]
    weights = [normal(tuple(out.shape)) for out in plain(*leaves)]

    def results(function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        outputs = function(*inputs)
        gradients = torch.autograd.grad(outputs, inputs, [weight.to(dtype, copy=True) for weight in weights])
        return [each.detach().float() for each in (*outputs, *gradients)]

    pairs = zip(results(fused, shape.dtype), results(plain, torch.float32), strict=True)
    return torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).max().item()


# Compiled blocks


def before_attention(
    block: LlamaDecoderLayer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, L, hidden) states that enter a block -> query, key and value as attention takes them."""
    query, key, value = projections(block.self_attn, block.input_layernorm(hidden))
    return *apply_rotary_pos_emb(query, key, cos, sin), value


def after_attention(block: LlamaDecoderLayer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """(B, L, hidden) states that entered a block, (B, L, heads * D) -> (B, L, hidden) states that leave it."""
    hidden = hidden + block.self_attn.o_proj(attended)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


@functools.cache
def compiled(function: Callable) -> Callable:
    """`function` compiled for any number of positions; all blocks share the graphs, since weights are inputs."""
    return torch.compile(function, dynamic=True)


class CompiledBlock(LlamaDecoderLayer):
    """Two graphs around the attention, which decides by the pack how it runs. They are used where gradients are wanted:
    graphs of other modes would take longer to compile than they save."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, **kwargs)
        states = compiled(before_attention)(self, hidden_states, *kwargs.pop("position_embeddings"))
        return compiled(after_attention)(self, hidden_states, attend(self.self_attn, *states, **kwargs))


def compile_blocks(backbone: nn.Module) -> None:
    """Have the blocks of a Llama backbone run as torch.compile makes them, from the first call on.

    Raises:
        UserError: nothing can be compiled here.
    """
    problem = _compile_problem(backbone.norm.weight.device)
    if problem:
        raise UserError(f"model.compile: torch.compile does not work here: {problem}")
    take_on(backbone, {LlamaDecoderLayer: CompiledBlock})


@functools.cache
def _compile_problem(device: torch.device) -> str | None:
    """What is wrong with a compilation of next to nothing."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            inputs = torch.ones(8, device=device, requires_grad=True)
            torch.compile(lambda states: states.sin() * 2, dynamic=False)(inputs).sum().backward()
    except Exception as problem:  # torch's, Triton's and their compilers' have no common base
        return next(line for line in f"{type(problem).__name__}: {problem}".splitlines() if line)
    return None
