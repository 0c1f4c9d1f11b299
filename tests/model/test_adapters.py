"""Adapters: trained alone, sampled with, merged into the export, and the model without them as its own reference."""

import copy

import pytest
import torch
from transformers import JanusForConditionalGeneration

from fastcorl.model import load_policy, save_policy
from fastcorl.model.adapters import adapted_layers, adapter_of, effective_weight
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.rollout.linear import JointLinear
from tests.helpers import make_policy

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def adapted(policy=None, *, seed=0):
    """A policy with adapters that do something."""
    policy = policy or make_policy()
    policy.add_adapters(rank=4, alpha=8.0, targets=TARGETS)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(policy.backbone):
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.data.normal_(0, 0.2, generator=generator)
    return policy


@pytest.fixture(scope="module")
def lora_policy():
    return adapted()


def text_log_probs(policy, prompts):
    rollout = RolloutEngine(policy).generate(prompts, 2, SamplingParams(max_new_tokens=6), seed=3)
    return rollout


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(policy, prompts):
    fresh = make_policy()
    fresh.add_adapters(rank=4, alpha=8.0, targets=TARGETS)
    trained = [name for name, parameter in fresh.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * 2  # two blocks, two matrices each
    assert all(".lora_" in name for name in trained)
    before, after = text_log_probs(policy, prompts), text_log_probs(fresh, prompts)
    assert torch.equal(before.texts.tokens, after.texts.tokens)
    assert torch.equal(before.images.tokens, after.images.tokens)


def test_sampled_log_probs_are_those_of_the_trained_forward(lora_policy, prompts):
    from fastcorl.algorithm import PackOptions, pack_rollout, packed_log_probs
    from tests.helpers import objective_options

    rollout = text_log_probs(lora_policy, prompts)
    (batch,) = pack_rollout(rollout, torch.zeros(rollout.num_rows), PackOptions(tokens=100_000))
    for modality, log_probs in packed_log_probs(lora_policy, batch, objective_options()).items():
        torch.testing.assert_close(log_probs, getattr(batch, modality).sampled_log_probs, atol=2e-5, rtol=0)


def test_products_with_and_without_a_copy_agree(lora_policy):
    attention = lora_policy.backbone.layers[0].self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    inputs = torch.randn(5, attention.q_proj.in_features, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([linear(inputs) for linear in linears], dim=1).detach()
    joint = JointLinear(*linears)
    for packed in {joint.packed, False}:
        joint.packed, joint.weight, joint.copied = packed, None, True
        joint.refresh()
        torch.testing.assert_close(joint(inputs), expected, atol=1e-5, rtol=1e-5)
        plus = torch.ones_like(expected)
        torch.testing.assert_close(joint(inputs, plus=plus), expected + 1, atol=1e-5, rtol=1e-5)


def test_without_adapters_is_the_start(policy, lora_policy, prompts):
    with lora_policy.without_adapters():
        assert adapter_of(lora_policy.backbone.layers[0].self_attn.q_proj) is None
        inside = text_log_probs(lora_policy, prompts)
    start, outside = text_log_probs(policy, prompts), text_log_probs(lora_policy, prompts)
    assert torch.equal(inside.images.tokens, start.images.tokens)
    torch.testing.assert_close(inside.images.log_probs, start.images.log_probs)
    assert not torch.equal(outside.images.log_probs, start.images.log_probs)


def test_the_export_is_the_merged_model(lora_policy, prompts, tmp_path):
    save_policy(lora_policy, tmp_path)
    merged = load_policy(tmp_path)
    assert not merged.has_adapters
    expected, exported = text_log_probs(lora_policy, prompts), text_log_probs(merged, prompts)
    assert torch.equal(expected.images.tokens, exported.images.tokens)
    torch.testing.assert_close(expected.images.log_probs, exported.images.log_probs, atol=2e-5, rtol=1e-5)


def test_peft_reads_the_adapters(lora_policy, tmp_path):
    from peft import PeftModel

    save_policy(lora_policy, tmp_path)
    start = make_policy().janus
    model = PeftModel.from_pretrained(start, tmp_path / "adapter").merge_and_unload()
    merged = JanusForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = merged.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, msg=name)


def test_half_precision_adapters_are_merged_in_float32(lora_policy):
    layer = copy.deepcopy(lora_policy.backbone.layers[0].self_attn.q_proj).to(torch.bfloat16)
    adapter = adapter_of(layer)
    expected = layer.weight.double() + adapter.up.double() @ adapter.down.double() * adapter.scaling
    error = (effective_weight(layer).double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 1e-6).all()
