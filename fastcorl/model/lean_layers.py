"""Norm, rotary embedding and SwiGLU of a Llama backbone on a CPU in float32: the maths of transformers' modules in
plain torch, in fewer passes over memory, and keeping less of it for backward.

They take the place of transformers' as Liger's kernels do on CUDA (`fused_layers.py`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from fastcorl.model.block_classes import GatedMLP, RotaryAttention, take_on


class LeanRMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight (Zhang and Sennrich 2019, eq. 4) of (.., H) states and (H,) weight."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale = norms.square_().div_(states.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        return (states * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        states, weight, scale = ctx.saved_tensors
        normed = states * scale
        weight_gradient = (gradient * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        inner = gradient * weight
        along = torch.linalg.vecdot(inner, normed).unsqueeze(-1).div_(len(weight))
        return inner.addcmul_(normed, along, value=-1).mul_(scale), weight_gradient, None


class LeanRotaryFunction(torch.autograd.Function):
    """(B, heads, L, D) states turned by (B, L, D) angles, whose two halves are alike (RoFormer, arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = states.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    turned = torch.empty_like(states)
    for out, own, other, sign in ((slice(half), 0, 1, -1), (slice(half, None), 1, 0, 1)):
        halves = states.split(half, dim=-1)
        torch.mul(halves[own], cos, out=turned[..., out]).addcmul_(halves[other], sin, value=sign)
    return turned


class LeanSwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up (Shazeer, arXiv 2002.05202); silu(gate) is computed again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        up_gradient = F.silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), up_gradient


def lean_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return LeanRotaryFunction.apply(query, cos, sin), LeanRotaryFunction.apply(key, cos, sin)


class LeanNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return LeanRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanAttention(RotaryAttention):
    rotary = staticmethod(lean_rotary)


class LeanMLP(GatedMLP):
    gated = LeanSwiGLUFunction.apply


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    LlamaRMSNorm: LeanNorm,
    LlamaAttention: LeanAttention,
    LlamaMLP: LeanMLP,
}


def use_lean(backbone: nn.Module) -> None:
    """Have a Llama backbone with SiLU, in float32 on a CPU, run on these; any other stays as it is."""
    weight, config = backbone.norm.weight, backbone.config
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or config.hidden_act not in ("silu", "swish"):
        return
    take_on(backbone, CLASSES)
