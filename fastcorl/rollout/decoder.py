"""The backbone and the heads as sampling runs them: on the policy's weights, any attention, no gradient."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fastcorl.model import Policy
from fastcorl.rollout.linear import JointLinear


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


class Attention(Protocol):
    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """(R, (heads + 2 kv_heads) D) projections of R positions, not rotated yet -> (R, heads D)."""
        ...


class Rope:
    """The rotary embedding of a backbone as a table; `cos` and `sin` are (positions, D) float32."""

    def __init__(self, backbone: nn.Module, num_positions: int):
        rotary = backbone.rotary_emb
        like = torch.empty(0, dtype=torch.float32, device=rotary.inv_freq.device)
        cos, sin = rotary(like, torch.arange(num_positions, device=like.device)[None])
        self.cos, self.sin = cos[0], sin[0]
        half = cos.shape[-1] // 2
        # `roll` by half a head exchanges its halves; the sign of the rotation is in the table.
        self.signed_sin = torch.cat([-self.sin[:, :half], self.sin[:, half:]], dim=1)

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(R,) positions -> what `rotate` takes."""
        tables = self.cos, self.signed_sin
        return tuple(table.index_select(0, positions).to(dtype)[:, None] for table in tables)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(R, heads, D) states, turned to the positions of `Rope.at`."""
    return (states * cos).addcmul_(states.roll(states.shape[-1] // 2, -1), sin)


class Decoder:
    """Runs a policy's Llama backbone and heads. It holds no weights of its own but the copies of `JointLinear`: call
    `refresh` after weights have changed.

    Raises TypeError for another kind of backbone.
    """

    def __init__(self, policy: Policy):
        backbone, head = policy.backbone, policy.janus.model.generation_head
        config = backbone.config
        if config.model_type != "llama" or config.hidden_act != "silu":
            raise TypeError(f"the rollout decodes Llama backbones with SiLU, not {config.model_type!r}")
        self.width, self.eps = config.hidden_size, config.rms_norm_eps
        self.blocks = [_Block.of(layer) for layer in backbone.layers]
        self.last_norm = backbone.norm.weight
        self.image_input, self.image_activation = JointLinear(head.proj_out), head.activation_fn
        self.image_output, self.text_output = JointLinear(policy.image_head), JointLinear(policy.text_head)
        attention = backbone.layers[0].self_attn
        self.geometry = Geometry(
            len(self.blocks),
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            attention.scaling,
            self.last_norm.dtype,
            self.last_norm.device,
        )

    def linears(self) -> list[JointLinear]:
        """All products, whose weights may be copies."""
        blocks = [linear for block in self.blocks for linear in (block.qkv, block.output, block.gate_up, block.down)]
        return [*blocks, self.image_input, self.image_output, self.text_output]

    def refresh(self) -> None:
        for linear in self.linears():
            linear.refresh()

    def __call__(self, embeds: torch.Tensor, attention: Attention) -> torch.Tensor:
        """(R, hidden) embeddings -> (R, hidden) final hidden states."""
        states = embeds
        for index, block in enumerate(self.blocks):
            attended = attention.attend(index, block.qkv(self._norm(states, block.input_norm)))
            states = block.output(attended, plus=states)
            gate, up = block.gate_up(self._norm(states, block.mlp_norm)).chunk(2, dim=-1)
            states = block.down(F.silu(gate).mul_(up), plus=states)
        return self._norm(states, self.last_norm)

    def image_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, hidden) -> (R, codes)."""
        return self.image_output(self.image_activation(self.image_input(hidden)))

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, hidden) -> (R, vocabulary)."""
        return self.text_output(hidden)

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, (self.width,), weight, self.eps)


class _Block(NamedTuple):
    input_norm: nn.Parameter
    qkv: JointLinear
    output: JointLinear
    mlp_norm: nn.Parameter
    gate_up: JointLinear
    down: JointLinear

    @classmethod
    def of(cls, layer: nn.Module) -> "_Block":
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            layer.input_layernorm.weight,
            JointLinear(attention.q_proj, attention.k_proj, attention.v_proj),
            JointLinear(attention.o_proj),
            layer.post_attention_layernorm.weight,
            JointLinear(mlp.gate_proj, mlp.up_proj),
            JointLinear(mlp.down_proj),
        )
