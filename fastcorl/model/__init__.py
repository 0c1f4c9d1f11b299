"""The policy model: loading, prompts, packed and cached attention, heads."""

from fastcorl.model.attention import CachedAttention, PackedAttention, register
from fastcorl.model.loading import load_policy, save_policy
from fastcorl.model.policy import Policy, pack_prompts
from fastcorl.model.prompts import PromptEncoder

register()

__all__ = [
    "CachedAttention",
    "PackedAttention",
    "Policy",
    "PromptEncoder",
    "load_policy",
    "pack_prompts",
    "save_policy",
]
