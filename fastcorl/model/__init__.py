"""The policy model: loading, prompts, packed attention, heads."""

from fastcorl.model.attention import PackedAttention, register
from fastcorl.model.loading import load_policy, save_policy
from fastcorl.model.policy import Policy, pack_prompts
from fastcorl.model.prompts import PromptEncoder

register()

__all__ = [
    "PackedAttention",
    "Policy",
    "PromptEncoder",
    "load_policy",
    "pack_prompts",
    "save_policy",
]
