"""The CPU's own norm, rotary embedding and SwiGLU give what transformers' modules give, and keep less."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from fastcorl.model.lean_layers import (
    CLASSES,
    LeanNorm,
    LeanRMSNormFunction,
    LeanRotaryFunction,
    LeanSwiGLUFunction,
    use_lean,
)
from fastcorl.model.loading import load_policy
from tests.helpers import make_policy
from tests.model.backbones import pack, prepared


def normal(*size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()


def test_gradients_are_those_of_the_values():
    angles = torch.linspace(0, 3, 5 * 4, dtype=torch.float64).view(1, 5, 4)
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
    assert gradcheck(LeanRMSNormFunction.apply, (normal(1, 5, 6), normal(6), 1e-6))
    assert gradcheck(LeanRotaryFunction.apply, (normal(1, 3, 5, 8), cos, sin))
    assert gradcheck(LeanSwiGLUFunction.apply, (normal(1, 5, 6), normal(1, 5, 6)))


def test_a_frozen_norm_has_no_gradient():
    states, weight = normal(1, 5, 6), normal(6).detach()
    LeanRMSNormFunction.apply(states, weight, 1e-6).sum().backward()
    assert weight.grad is None and states.grad is not None


def results(policy, batch):
    """Hidden states and all gradients of a pack, and the bytes that autograd kept."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden_states(batch)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    trained = [weight for _, weight in policy.trained_parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(hidden, trained, weights, allow_unused=True)
    return [hidden, *(gradient for gradient in gradients if gradient is not None)], sum(kept.values())


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_backbone_gives_the_same_and_keeps_less(lora, recomputed):
    plain, lean = (prepared(lora=lora, recomputed=recomputed) for _ in range(2))
    use_lean(lean.backbone)
    assert isinstance(lean.backbone.norm, LeanNorm) and type(plain.backbone.norm) is LlamaRMSNorm
    assert plain.state_dict().keys() == lean.state_dict().keys()
    lengths = [40, 3, 2, 17]
    (expected, before), (found, after) = (results(policy, pack(policy, lengths)) for policy in (plain, lean))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert after < 0.95 * before


def test_only_float32_on_a_cpu_changes():
    policy = make_policy().to(torch.bfloat16)
    use_lean(policy.backbone)
    assert not any(type(module) in CLASSES.values() for module in policy.backbone.modules())


@pytest.mark.parametrize(("choice", "number"), [("auto", 4 * 2 + 1 + 4 + 4), ("off", 0)])
def test_a_run_takes_them_unless_told_otherwise(choice, number):
    policy = load_policy("quickstart", liger=choice)
    assert sum(type(module) in CLASSES.values() for module in policy.backbone.modules()) == number
    plain = (LlamaRMSNorm, LlamaAttention, LlamaMLP)
    assert sum(isinstance(module, plain) for module in policy.backbone.modules()) == 17
