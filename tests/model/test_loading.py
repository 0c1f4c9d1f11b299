import json
import shutil

import pytest
import torch
from transformers import JanusForConditionalGeneration

from fastcorl.errors import UserError
from fastcorl.model import load_policy, pack_prompts, save_policy


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(policy, folder)
    return folder


def hidden_states(policy, prompts):
    ids = [policy.encoder.ask(prompt.question) for prompt in prompts]
    features = policy.vision_features(policy.preprocess([prompt.image for prompt in prompts]))
    return policy.hidden_states(pack_prompts(ids, features, policy.encoder.image_id, policy.device))


def test_what_was_saved_is_loaded(policy, saved, prompts):
    loaded = load_policy(saved, templates={"MC": "{question}!"})
    for (name, ours), (other, theirs) in zip(
        policy.janus.state_dict().items(), loaded.janus.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(ours, theirs)
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    assert trained == [parameter.requires_grad for parameter in loaded.parameters()]
    assert not any(module.training for module in loaded.modules())
    for prompt in prompts:
        assert loaded.encoder.draw(prompt.caption) == policy.encoder.draw(prompt.caption)
        assert loaded.encoder.ask(prompt.question, "MC") == policy.encoder.ask(prompt.question + "!")
        assert torch.equal(loaded.preprocess([prompt.image]), policy.preprocess([prompt.image]))
    loaded.encoder.templates = {}
    with torch.no_grad():
        assert torch.equal(hidden_states(loaded, prompts), hidden_states(policy, prompts))


def test_transformers_loads_what_was_saved(reference, saved):
    theirs = JanusForConditionalGeneration.from_pretrained(saved)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    ids = torch.tensor([[0, 9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_the_type_of_the_weights(saved):
    policy = load_policy(saved, dtype=torch.bfloat16)
    assert policy.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_no_gradient(saved, policy, prompts):
    checkpointed = load_policy(saved, gradient_checkpointing=True)
    calls = []
    checkpointed.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    hidden = [hidden_states(each, prompts) for each in (checkpointed, policy)]
    assert torch.equal(*hidden)
    gradients = [
        torch.autograd.grad(states.square().sum(), [each.backbone.layers[0].self_attn.q_proj.weight])[0]
        for states, each in zip(hidden, (checkpointed, policy), strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert len(calls) == 2  # the block ran again for the backward


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


BREAKAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no special tokens": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "no processor": lambda folder: (folder / "processor_config.json").unlink(),
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\x00"),
    "config is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "another model": lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
    "an unknown model": lambda folder: (folder / "config.json").write_text('{"model_type": "xyzzy"}'),
    "other shapes": lambda folder: write_config(folder, intermediate_size=96),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_bad_checkpoint_is_told_in_one_line(saved, tmp_path, breakage):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    BREAKAGES[breakage](folder)
    with pytest.raises(UserError) as caught:
        load_policy(folder)
    message = str(caught.value)
    assert message.startswith("model.path: ") and str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["missing", "missing/deeper"])
def test_a_missing_folder(tmp_path, path):
    with pytest.raises(UserError, match=r"^model\.path: there is no folder '.*missing"):
        load_policy(tmp_path / path)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^model\.path: [^\n]*$"):
        load_policy(tmp_path / "file")
