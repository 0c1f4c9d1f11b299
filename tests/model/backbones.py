"""Policies whose blocks compute in another way, and packs for them."""

import torch

from fastcorl.model import pack_prompts
from fastcorl.model.adapters import adapted_layers
from tests.helpers import make_policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepared(*, lora=False, recomputed=0):
    """A policy as `load_policy` and a trainer leave it; its adapters do something."""
    policy = make_policy().to(DEVICE)
    policy.lay_out()
    policy.recompute(recomputed)
    if lora:
        policy.add_adapters(rank=2, alpha=4, targets=["q_proj", "o_proj", "gate_proj", "down_proj"])
        generator = torch.Generator().manual_seed(3)
        for layer in adapted_layers(policy.backbone):
            weight = layer.lora_B["default"].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / 5)
    return policy


def pack(policy, lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    prompts = [torch.randint(10, 200, (length,), generator=generator).tolist() for length in lengths]
    return pack_prompts(prompts, None, policy.encoder.image_id, policy.device)
