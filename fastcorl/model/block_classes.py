"""What modules of a Llama block that compute faster have in common, whatever computes.

A module takes on a subclass of its class: parameters, names, hooks and submodules stay, and transformers' own classes
are as they were.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from fastcorl.model.attention import fastcorl_attention


class RotaryAttention(LlamaAttention):
    """Attention with another rotary embedding."""

    rotary: Callable
    """(B, heads, L, D) query, (B, kv_heads, L, D) key, (B, L, D) cos and sin -> query and key, turned."""

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = projections(self, hidden_states)
        query, key = self.rotary(query, key, *position_embeddings)
        return self.o_proj(attend(self, query, key, value, **kwargs)), None


class GatedMLP(LlamaMLP):
    """An MLP with another silu(gate) * up."""

    gated: Callable
    """(.., I) gate and up -> (.., I)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


def take_on(backbone: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Give the modules of a backbone that are of just these classes the ones they are mapped to."""
    for module in backbone.modules():
        module.__class__ = classes.get(type(module), type(module))


def projections(attention: LlamaAttention, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, L, hidden) -> (B, heads, L, D) query, (B, kv_heads, L, D) key and value."""
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    return tuple(linear(hidden).view(shape).transpose(1, 2) for linear in linears)


def attend(
    module: LlamaAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """(B, heads, L, D) query, (B, kv_heads, L, D) key and value -> (B, L, heads * D); `kwargs` hold the context."""
    kwargs.pop("attention_mask", None)  # the context knows what sees what
    return fastcorl_attention(module, query, key, value, None, module.scaling, **kwargs)[0].flatten(2)
