"""Checkpoints that cannot be converted."""

import shutil

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.model import weight_files
from fastcorl.model.convert import convert_checkpoint
from tests.model.original_layout import change_config, change_json, write_weights

QKV = "vision_model.vision_tower.blocks.0.attn.qkv.weight"


def without(name):
    return lambda folder, state: rewrite(folder, {key: value for key, value in state.items() if key != name})


def rewrite(folder, state, kind="safetensors", files=1):
    (folder / "model.safetensors").unlink()
    write_weights(folder, state, kind=kind, files=files)


def configure(dotted, value):
    return lambda folder, state: change_config(folder, dotted, value)


def run_code():
    raise AssertionError("code of the file was run")


class Malicious:
    def __reduce__(self):
        return run_code, ()


def lose_a_shard(folder, state):
    rewrite(folder, state, files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def write_code(folder, state):
    (folder / "model.safetensors").unlink()
    torch.save({"gen_embed.weight": Malicious()}, folder / "pytorch_model.bin")


BREAKAGES = {
    "a tensor is missing": (without("gen_embed.weight"), r"lacks 1 tensors.*generation_embeddings\.weight"),
    "a fused tensor is missing": (without(QKV), r"lacks 3 tensors.*self_attn\.k_proj\.weight"),
    "an unknown tensor": (
        lambda folder, state: rewrite(folder, state | {"gen_head.extra.weight": torch.zeros(1)}),
        r"gen_head\.extra\.weight is not known",
    ),
    "a block too many": (
        lambda folder, state: rewrite(folder, state | {"language_model.model.layers.2.mlp.up.weight": torch.ones(1)}),
        r"language_model\.model\.layers\.2\.mlp\.up\.weight .* has no place",
    ),
    "a query-key-value of another shape": (
        lambda folder, state: rewrite(folder, state | {QKV: torch.zeros(97, 32)}),
        r"attn\.qkv\.weight .* has shape 33x32, but config\.json makes it 32x32",
    ),
    "another vocabulary": (
        configure("language_config.vocab_size", 999),
        r"language_model\.lm_head\.weight.* makes it 999x64",
    ),
    "a missing file": (lose_a_shard, r"model-00002-of-00002\.safetensors: no such file"),
    "a file cut short": (
        lambda folder, state: (folder / "model.safetensors").write_bytes(b"\x10\x00"),
        r"model\.safetensors: cannot be read as weights",
    ),
    "code in a pickle": (write_code, r"pytorch_model\.bin: cannot be read as weights"),
    "no weights": (lambda folder, state: (folder / "model.safetensors").unlink(), r"holds no weights"),
    "no head's size": (configure("gen_head_config.params.n_embed", None), r"lacks gen_head_config\.params\.n_embed"),
    "an unknown tower": (configure("vision_config.params.model_name", "sam"), r"model_name is 'sam'; supported"),
    "another kind of model": (configure("model_type", "llava"), r"model_type is 'llava'; supported: 'multi_modality'"),
    "a number as text": (configure("vision_config.params.image_size", "16"), r"image_size is '16', expected int"),
    "tied embeddings": (configure("language_config.tie_word_embeddings", True), r"tie_word_embeddings is true"),
    "heads that do not divide": (configure("language_config.num_attention_heads", 7), r"language_config: .*hidden"),
    "config is not JSON": (lambda folder, state: (folder / "config.json").write_text("{"), r"cannot be read as JSON"),
    "no tokenizer": (lambda folder, state: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
    "a broken tokenizer": (
        lambda folder, state: (folder / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json: cannot be read as a tokenizer",
    ),
    "no end token": (
        lambda folder, state: change_json(folder / "tokenizer_config.json", eos_token=None),
        r"tokenizer_config\.json: lacks eos_token",
    ),
    "no padding token": (
        lambda folder, state: change_json(folder / "processor_config.json", pad_tag="<none>"),
        r"has no token '<none>' \(pad_tag\)",
    ),
    "images of another size": (
        lambda folder, state: change_json(folder / "preprocessor_config.json", image_size=32),
        r"preprocessor_config\.json: image_size is 32, but the model's is 16",
    ),
    "another number of image tokens": (
        lambda folder, state: change_json(folder / "processor_config.json", num_image_tokens=9),
        r"processor_config\.json: num_image_tokens is 9, but the model has 16",
    ),
    "another conversation": (
        lambda folder, state: change_json(folder / "processor_config.json", sft_format="plain"),
        r"sft_format is 'plain'",
    ),
    "a template without images": (
        lambda folder, state: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}"),
        r"loses the image or the question",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_bad_source_is_told_in_one_line_and_nothing_is_written(original, original_tensors, tmp_path, breakage):
    break_it, message = BREAKAGES[breakage]
    break_it(original, original_tensors)
    with pytest.raises(UserError, match=message) as caught:
        convert_checkpoint(original, tmp_path / "new")
    assert "\n" not in str(caught.value) and str(original) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_the_target_is_complete_or_absent(original, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            convert_checkpoint(original, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    shutil.copytree(original, tmp_path / "taken")
    with pytest.raises(UserError, match="taken: exists and is not an empty folder"):
        convert_checkpoint(original, tmp_path / "taken")
