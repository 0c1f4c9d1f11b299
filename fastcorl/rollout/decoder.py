"""The backbone for one new token per row, on the policy's own weights."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fastcorl.model.projections import joint_projections, side_by_side


class Geometry(NamedTuple):
    """Shape of the cached states of a backbone."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    dtype: torch.dtype
    device: torch.device

    def page_bytes(self, tokens: int) -> int:
        """Memory of the keys and values of so many tokens in all layers."""
        return 2 * self.layers * tokens * self.kv_heads * self.head_dim * self.dtype.itemsize


class DecodeCache(Protocol):
    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """(R, (heads + 2 kv_heads) D) projections of the new tokens -> (R, heads D); caches their keys and values."""
        ...


class Decoder:
    """Steps a Llama backbone. It holds no weights of its own, except copies of projections that do not lie side by side
    (see `model.projections`); call `refresh` after weights have changed.

    Raises TypeError for another kind of backbone.
    """

    def __init__(self, backbone: nn.Module):
        config = backbone.config
        if config.model_type != "llama" or config.hidden_act != "silu":
            raise TypeError(f"the rollout decodes Llama backbones with SiLU, not {config.model_type!r}")
        self.backbone = backbone
        self.eps = config.rms_norm_eps
        self.width = config.hidden_size
        self.blocks = [
            _Block(
                layer.input_layernorm.weight,
                _Joint(qkv),
                layer.self_attn.o_proj,
                layer.post_attention_layernorm.weight,
                _Joint(gate_up),
                layer.mlp.down_proj,
            )
            for layer, (qkv, gate_up) in zip(backbone.layers, joint_projections(backbone), strict=True)
        ]
        self.last_norm = backbone.norm.weight

    def geometry(self) -> Geometry:
        config, attention = self.backbone.config, self.backbone.layers[0].self_attn
        return Geometry(
            len(self.blocks),
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            attention.scaling,
            self.last_norm.dtype,
            self.last_norm.device,
        )

    def copied_bytes(self) -> int:
        """Bytes of weights that had to be copied."""
        return sum(joint.weight.nbytes for block in self.blocks for joint in (block.qkv, block.gate_up) if joint.copied)

    def refresh(self) -> None:
        for block in self.blocks:
            block.qkv.refresh()
            block.gate_up.refresh()

    def rope_table(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(num_positions, D) float32 cosines and sines of the backbone's rotary embedding."""
        rotary = self.backbone.rotary_emb
        like = torch.empty(0, dtype=torch.float32, device=rotary.inv_freq.device)
        cos, sin = rotary(like, torch.arange(num_positions, device=like.device)[None])
        return cos[0], sin[0]

    def __call__(self, embeds: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """(R, hidden) embeddings of the new tokens -> (R, hidden) final hidden states."""
        states = embeds
        for index, block in enumerate(self.blocks):
            attended = cache.attend(index, block.qkv(self._norm(states, block.input_norm)))
            states = _add_linear(states, attended, block.output)
            gate, up = block.gate_up(self._norm(states, block.mlp_norm)).chunk(2, dim=-1)
            states = _add_linear(states, F.silu(gate).mul_(up), block.down)
        return self._norm(states, self.last_norm)

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, (self.width,), weight, self.eps)


def _add_linear(states: torch.Tensor, inputs: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """The residual stream plus a linear layer, in one product."""
    if linear.bias is not None:
        states = states + linear.bias
    return torch.addmm(states, inputs, linear.weight.t())


class _Joint:
    """Linear layers of one input as one."""

    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = linears
        view = side_by_side([linear.weight for linear in linears])
        self.copied = view is None
        self.weight = torch.cat([linear.weight.detach() for linear in linears]) if self.copied else view
        self.bias = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        if self.copied:
            torch.cat([linear.weight for linear in self.linears], out=self.weight)
        if self.linears[0].bias is not None:
            joint = torch.cat([linear.bias for linear in self.linears])
            self.bias = joint if self.bias is None else self.bias.copy_(joint)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)


class _Block(NamedTuple):
    input_norm: nn.Parameter
    qkv: _Joint
    output: nn.Linear
    mlp_norm: nn.Parameter
    gate_up: _Joint
    down: nn.Linear
