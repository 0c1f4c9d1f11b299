"""The random tiny Janus in the original `multi_modality` layout. Every name is written out here, as
github.com/deepseek-ai/Janus has it, so that this knows nothing of the code it tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import JanusForConditionalGeneration

from tests.helpers import HIDDEN_SIZE, IMAGE_SIZE, NUM_CODES, NUM_IMAGE_TOKENS, make_tokenizer

TOWER, VQ = "siglip_tiny_patch4_16", "VQ-4"
TINY_TOWERS = {
    TOWER: {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "mlp_ratio": 2.0}
}
TINY_VQ_MODELS = {
    VQ: {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "latent_channels": 32}
}


def original_config() -> dict:
    mlp = {"depth": 2, "n_embed": HIDDEN_SIZE, "projector_type": "mlp_gelu"}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "params": {
                "image_size": IMAGE_SIZE,
                "model_name": TOWER,
                "select_feature": "same",
                "select_layer": -1,
            },
        },
        "aligner_config": {"cls": "MlpProjector", "params": {"input_dim": 32, **mlp}},
        "gen_vision_config": {"cls": VQ, "params": {"image_token_size": NUM_CODES, "n_embed": 8}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {"input_dim": 8, **mlp}},
        "gen_head_config": {
            "cls": "vision_head",
            "params": {"image_token_embed": HIDDEN_SIZE, "image_token_size": NUM_CODES, "n_embed": HIDDEN_SIZE},
        },
        "language_config": {
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(make_tokenizer()),
        },
    }


def original_state(janus: JanusForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's tensors under their original names, and those that only the original has."""
    ours = dict(janus.state_dict())
    state: dict[str, torch.Tensor] = {}

    def move(original: str, name: str) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in ours:
                state[f"{original}.{kind}"] = ours.pop(f"{name}.{kind}")

    _move_vision(ours, state, move)
    for original, name in (("encoder", "down"), ("decoder", "up")):
        _move_vq_half(f"gen_vision_model.{original}", f"model.vqmodel.{original}", name, move)
    move("gen_vision_model.quantize.embedding", "model.vqmodel.quantize.embedding")
    move("gen_vision_model.quant_conv", "model.vqmodel.quant_conv")
    move("gen_vision_model.post_quant_conv", "model.vqmodel.post_quant_conv")
    move("gen_embed", "model.generation_embeddings")
    move("gen_aligner.layers.0", "model.generation_aligner.fc1")
    move("gen_aligner.layers.2", "model.generation_aligner.hidden_layers.0")
    move("gen_head.output_mlp_projector", "model.generation_head.proj_out")
    move("gen_head.vision_head", "model.generation_head.vision_head")
    for layer in range(2):
        original, name = f"language_model.model.layers.{layer}", f"model.language_model.layers.{layer}"
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            move(f"{original}.{part}", f"{name}.{part}")
        for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            move(f"{original}.{part}", f"{name}.{part}")
    move("language_model.model.embed_tokens", "model.language_model.embed_tokens")
    move("language_model.model.norm", "model.language_model.norm")
    move("language_model.lm_head", "lm_head")
    assert not ours, f"the helper forgot {sorted(ours)}"

    pool = "vision_model.vision_tower.attn_pool"
    for name, shape in (("latent", (1, 1, 32)), ("q.weight", (32, 32)), ("kv.bias", (64,)), ("mlp.fc1.bias", (64,))):
        state[f"{pool}.{name}"] = torch.randn(shape)
    state["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    return state


def _move_vision(ours: dict[str, torch.Tensor], state: dict[str, torch.Tensor], move) -> None:
    tower, model = "vision_model.vision_tower", "model.vision_model"
    state[f"{tower}.pos_embed"] = ours.pop(f"{model}.embeddings.position_embedding.weight")[None]
    move(f"{tower}.patch_embed.proj", f"{model}.embeddings.patch_embedding")
    block, layer = f"{tower}.blocks.0", f"{model}.encoder.layers.0"
    for kind in ("weight", "bias"):
        parts = [ours.pop(f"{layer}.self_attn.{part}.{kind}") for part in ("q_proj", "k_proj", "v_proj")]
        state[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    move(f"{block}.attn.proj", f"{layer}.self_attn.projection_layer")
    move(f"{block}.norm1", f"{layer}.layer_norm1")
    move(f"{block}.norm2", f"{layer}.layer_norm2")
    move(f"{block}.mlp.fc1", f"{layer}.mlp.fc1")
    move(f"{block}.mlp.fc2", f"{layer}.mlp.fc2")
    move(f"{tower}.norm", f"{model}.post_layernorm")
    move("aligner.layers.0", "model.aligner.fc1")
    move("aligner.layers.2", "model.aligner.hidden_layers.0")


def _move_vq_half(half: str, name: str, levels: str, move) -> None:
    def move_res(original: str, ours: str) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"):
            move(f"{original}.{part}", f"{ours}.{part}")

    def move_attn(original: str, ours: str) -> None:
        for part in ("norm", "q", "k", "v", "proj_out"):
            move(f"{original}.{part}", f"{ours}.{part}")

    for part in ("conv_in", "norm_out", "conv_out"):
        move(f"{half}.{part}", f"{name}.{part}")
    move_res(f"{half}.mid.0", f"{name}.mid.block_1")
    move_attn(f"{half}.mid.1", f"{name}.mid.attn_1")
    move_res(f"{half}.mid.2", f"{name}.mid.block_2")
    for level in range(3):
        for block in range(2):
            move_res(f"{half}.conv_blocks.{level}.res.{block}", f"{name}.{levels}.{level}.block.{block}")
            move_attn(f"{half}.conv_blocks.{level}.attn.{block}", f"{name}.{levels}.{level}.attn.{block}")
        for sampling in ("downsample", "upsample"):
            move(f"{half}.conv_blocks.{level}.{sampling}.conv", f"{name}.{levels}.{level}.{sampling}.conv")


def write_original(folder: Path, state: dict[str, torch.Tensor], *, kind: str = "safetensors", files: int = 1) -> None:
    """A checkpoint folder; `kind` is "safetensors" or "bin", the weights in so many `files`."""
    folder.mkdir()
    write_weights(folder, state, kind=kind, files=files)
    _write_json(folder / "config.json", original_config())
    tokenizer = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    tokenizer.post_processor = processors.ByteLevel()  # as published: the begin token is the tokenizer class's doing
    tokenizer.save(str(folder / "tokenizer.json"))
    names = make_tokenizer()
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": names.bos_token},
        "eos_token": names.eos_token,
        "pad_token": names.eos_token,  # not what the processor pads with
        "model_max_length": 16384,
        "chat_template": "User: {{ messages }}",  # of the language model; it knows no images
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": ["<|User|>", "<|Assistant|>"]})
    processor = {"processor_class": "VLChatProcessor", "sft_format": "deepseek", "num_image_tokens": NUM_IMAGE_TOKENS}
    _write_json(folder / "processor_config.json", processor)
    image = {"image_size": IMAGE_SIZE, "min_size": 4, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.4, 0.3]}
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "VLMImageProcessor", **image})


def write_weights(folder: Path, state: dict[str, torch.Tensor], *, kind: str, files: int) -> None:
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(state)
    weight_map = {}
    for number in range(files):
        part = {name: state[name].contiguous() for name in names[number::files]}
        file = f"{stem}-{number + 1:05d}-of-{files:05d}.{suffix}" if files > 1 else f"{stem}.{suffix}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        _write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_config(folder, dotted, value):
    config = json.loads((folder / "config.json").read_text())
    *parents, last = dotted.split(".")
    entry = config
    for key in parents:
        entry = entry[key]
    entry[last] = value
    (folder / "config.json").write_text(json.dumps(config))
