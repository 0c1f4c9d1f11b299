"""Sampling with weights that are the trainer's own: shared, updated in place, guarded."""

import copy

import pytest
import torch

from fastcorl.model import load_policy, save_policy
from fastcorl.model.projections import side_by_side
from fastcorl.rollout import RolloutEngine, SamplingParams, linear
from fastcorl.rollout.decoder import Decoder
from tests.helpers import make_policy

PARAMS = SamplingParams(1.0, 5.0, 8)


@pytest.fixture
def own_policy():
    return make_policy()


def same(one, other):
    return torch.equal(one.images.tokens, other.images.tokens) and one.texts.answers == other.texts.answers


# Layout


def test_side_by_side():
    whole = torch.arange(24.0).view(6, 4)
    parts = whole.split([1, 3, 2])
    joint = side_by_side(parts)
    assert torch.equal(joint, whole) and joint.data_ptr() == whole.data_ptr()
    assert torch.equal(side_by_side(parts[1:]), whole[1:])
    assert side_by_side([parts[0], parts[2]]) is None  # a gap
    assert side_by_side([parts[1], parts[0]]) is None  # another order
    assert side_by_side([parts[0], parts[1].clone()]) is None  # other storage
    assert side_by_side([whole[:, :2], whole[:, 2:]]) is None


@pytest.fixture
def unpacked(monkeypatch):
    """As on a GPU: weights are read where they are."""
    monkeypatch.setattr(linear, "onednn_packs", lambda dtype: False)


def copies(decoder):
    """How many layers each of the copied products joins."""
    return [len(joint.linears) for joint in decoder.linears() if joint.copied]


@pytest.mark.usefixtures("unpacked")
def test_a_laid_out_model_is_read_in_place_and_is_the_same_model(own_policy, prompts):
    before = {name: tensor.clone() for name, tensor in own_policy.state_dict().items()}
    copied = RolloutEngine(own_policy)
    expected = copied.generate(prompts, 2, PARAMS)
    assert copies(copied.decoder) == [3, 2] * len(own_policy.backbone.layers)  # q, k, v and gate, up
    own_policy.lay_out()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own_policy.state_dict().items())
    engine = RolloutEngine(own_policy)
    assert not copies(engine.decoder)
    assert same(engine.generate(prompts, 2, PARAMS), expected)


@pytest.mark.usefixtures("unpacked")
def test_loading_lays_out_saving_and_copying_keep_values(own_policy, tmp_path):
    save_policy(own_policy, tmp_path / "first")
    loaded = load_policy(tmp_path / "first")
    assert not copies(Decoder(loaded))
    twin = copy.deepcopy(loaded)  # as the one that ZeRO 3 samples with
    twin.lay_out()
    assert not copies(Decoder(twin))
    save_policy(loaded, tmp_path / "second")
    again = load_policy(tmp_path / "second").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own_policy.state_dict().items())


@pytest.mark.parametrize("layout", ["packed", "in place", "copied"])
def test_an_optimizer_step_is_seen_by_the_next_rollout(own_policy, prompts, layout, monkeypatch):
    if layout == "packed" and not linear.onednn_packs(torch.float32):
        pytest.skip("oneDNN does not pack here")
    if layout != "packed":
        monkeypatch.setattr(linear, "onednn_packs", lambda dtype: False)
    if layout == "in place":
        own_policy.lay_out()
    engine = RolloutEngine(own_policy)
    engine.weight_version = 0
    before = engine.generate(prompts, 2, PARAMS, seed=1)
    assert same(engine.generate(prompts, 2, PARAMS, seed=1), before)
    pixels = before.images.pixels[:2]
    states = engine.match_states(pixels, ["a red 3", "5"])[0]
    optimizer = torch.optim.SGD(own_policy.backbone.parameters(), lr=0.05)
    for parameter in own_policy.backbone.parameters():
        parameter.grad = torch.sign(parameter.detach())
    optimizer.step()
    engine.weight_version = 1
    assert not torch.allclose(engine.match_states(pixels, ["a red 3", "5"])[0], states, atol=1e-3)
    after = engine.generate(prompts, 2, PARAMS, seed=1)
    assert not same(after, before)
    assert same(after, RolloutEngine(own_policy).generate(prompts, 2, PARAMS, seed=1))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("laid_out", [True, False])
@torch.no_grad()
def test_joint_linear(packed, bias, laid_out, monkeypatch):
    if packed and not linear.onednn_packs(torch.float32):
        pytest.skip("oneDNN does not pack here")
    if not packed:
        monkeypatch.setattr(linear, "onednn_packs", lambda dtype: False)
    torch.manual_seed(0)
    linears = [torch.nn.Linear(24, width, bias=bias) for width in (8, 40, 5)]
    if laid_out:
        joint = torch.cat([each.weight for each in linears])
        for each, part in zip(linears, joint.split([8, 40, 5]), strict=True):
            each.weight.data = part
    joint = linear.JointLinear(*linears)
    assert joint.copied == (packed or not laid_out)
    for rows in (1, 7, 64, 200):
        inputs, plus = torch.randn(rows, 24), torch.randn(rows, 53)
        for _ in range(2):
            expected = torch.cat([each(inputs) for each in linears], dim=1)
            torch.testing.assert_close(joint(inputs), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(joint(inputs, plus=plus), expected + plus, rtol=0, atol=1e-5)
            for each in linears:
                each.weight.mul_(1.5)
                if bias:
                    each.bias.add_(1.0)
            joint.refresh()


def test_a_row_of_a_packed_product_does_not_depend_on_their_number():
    if not linear.onednn_packs(torch.float32):
        pytest.skip("oneDNN does not pack here")
    torch.manual_seed(0)
    joint = linear.JointLinear(torch.nn.Linear(192, 1024, bias=False))
    inputs = torch.randn(200, 192)
    whole = joint(inputs)
    assert all(torch.equal(joint(inputs[:rows].contiguous()), whole[:rows]) for rows in (1, 2, 3, 16, 64, 129))


# What is kept between calls


def test_the_unconditional_chain_lives_as_long_as_its_weights(own_policy, prompts, monkeypatch):
    engine = RolloutEngine(own_policy)
    run, calls = engine.prefiller.unconditional, []
    monkeypatch.setattr(engine.prefiller, "unconditional", lambda lengths: calls.append(lengths) or run(lengths))

    def draw(chosen, version):
        engine.weight_version = version
        engine.generate([prompts[i] for i in chosen], 1, PARAMS, answer=False)
        return len(calls)

    assert [draw([0], 0), draw([0], 0), draw([0, 4], 0), draw([0], 0), draw([4], 0)] == [1, 1, 2, 2, 2]
    assert [draw([0], 1), draw([0], 1)] == [3, 3]
    assert [draw([0], None), draw([0], None)] == [4, 5]  # unknown weights: nothing is kept
    assert [draw([0], 1), draw([0], 1)] == [6, 6]


def test_the_table_of_codes_is_made_once_and_again_when_its_weights_change(own_policy, prompts, monkeypatch):
    engine = RolloutEngine(own_policy)
    first = engine.generate(prompts, 1, PARAMS, answer=False)
    table = engine._codes()
    codes = torch.arange(own_policy.num_codes)
    assert torch.equal(table, own_policy.embed_codes(codes))
    embed, embedded = own_policy.embed_codes, []
    monkeypatch.setattr(own_policy, "embed_codes", lambda codes: embedded.append(len(codes)) or embed(codes))
    engine.generate(prompts, 1, PARAMS, answer=False)
    engine.generate(prompts, 1, PARAMS)
    assert not any(embedded)  # packs without codes embed none
    with torch.no_grad():
        own_policy.janus.model.generation_embeddings.weight.mul_(-1)
    second = engine.generate(prompts, 1, PARAMS, answer=False)
    assert sum(embedded) == len(codes) and engine._codes() is table and torch.equal(table, embed(codes))
    assert not torch.equal(first.images.tokens, second.images.tokens)


def test_each_image_goes_through_the_tower_once(own_policy, prompts, monkeypatch):
    seen = []
    tower = own_policy.vision_features
    monkeypatch.setattr(own_policy, "vision_features", lambda pixels: seen.append(len(pixels)) or tower(pixels))
    pair = [prompts[0], prompts[1], prompts[0]]
    rollout = RolloutEngine(own_policy).generate(pair, 4, PARAMS)
    assert seen == [2] and len(rollout.vision_features) == 3
    assert torch.equal(rollout.vision_features[0], rollout.vision_features[2])
    assert not torch.equal(rollout.vision_features[0], rollout.vision_features[1])


# Guards


def test_a_parameter_that_moved_trips_the_guard(own_policy, prompts):
    engine = RolloutEngine(own_policy)
    engine.generate(prompts, 1, PARAMS)
    weight = own_policy.backbone.layers[1].mlp.down_proj.weight
    weight.data = weight.data.clone()
    with pytest.raises(
        RuntimeError, match="layers.1.mlp.down_proj.weight has moved since the rollout engine was built"
    ):
        engine.generate(prompts, 1, PARAMS)
    RolloutEngine(own_policy).generate(prompts, 1, PARAMS)


def test_another_kind_of_backbone_is_refused(own_policy):
    own_policy.backbone.config.model_type = "qwen2"
    with pytest.raises(TypeError, match="decodes Llama backbones with SiLU, not 'qwen2'"):
        RolloutEngine(own_policy)


def test_biases_of_projections_are_used(prompts):
    policy = make_policy()
    config = copy.deepcopy(policy.backbone.config)
    config.attention_bias = config.mlp_bias = True
    backbone = type(policy.backbone)(config).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.normal_(0, 0.3) if name.endswith("bias") else parameter.copy_(policy.backbone.get_parameter(name))
    policy.janus.model.language_model = backbone
    backbone.set_attn_implementation("fastcorl")
    rollout = RolloutEngine(policy).generate(prompts, 1, PARAMS, draw=False)
    for row, prompt in enumerate(prompts):
        answer = rollout.texts.tokens[row, : rollout.texts.lengths[row]]
        ids = policy.encoder.ask(prompt.question)
        (states,) = RolloutEngine(policy).hidden_states([ids + answer.tolist()], [rollout.vision_features[row]])
        with torch.no_grad():
            log_probs = policy.text_head(states[len(ids) - 1 : -1]).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(log_probs, rollout.texts.log_probs[row, : len(answer)], rtol=0, atol=1e-4)
