"""The configuration of a `multi_modality` checkpoint, read as a JanusConfig."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import JanusConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from fastcorl.errors import UserError

# The original configuration gives vision tower and VQ model by name; their sizes are in its code
# (github.com/deepseek-ai/Janus, janus/models/siglip_vit.py and vq_model.py). Janus, Janus-Pro-1B and 7B have these.
VISION_TOWERS = {
    "siglip_large_patch16_384": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "mlp_ratio": 4.0,
    },
}
VQ_MODELS = {
    "VQ-16": {
        "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "latent_channels": 256,
    },
}


class OriginalConfig:
    """Entries of an original config.json, each checked when it is read. Raises UserError naming the entry."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values = values
        self.where = where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The entry at a dotted key; `default` where it is absent, unless that is None."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where}: lacks {key}; is this a Janus or Janus-Pro in the original layout?")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key} is {value!r}, expected {kind.__name__}")
        return value

    def expect(self, key: str, kind: type, *supported: Any, default: Any = None) -> Any:
        value = self.get(key, kind, default)
        if value not in supported:
            known = ", ".join(repr(each) for each in supported)
            raise UserError(f"{self.where}: {key} is {value!r}; supported: {known}")
        return value


def janus_config(
    original: OriginalConfig, *, image_token_id: int, token_ids: dict[str, int], dtype: torch.dtype
) -> JanusConfig:
    """The configuration in transformers' terms. `token_ids`: bos_token_id, eos_token_id and pad_token_id.

    Raises UserError where an entry is missing or transformers' Janus cannot be built that way.
    """
    original.expect("model_type", str, "multi_modality")
    text = _text_config(original, token_ids)
    vision = _vision_config(original)
    vq = _vq_config(original, text.hidden_size)
    original.expect("aligner_config.params.n_embed", int, text.hidden_size)
    for part in (text, vision, vq):
        part.dtype = dtype
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=image_token_id,
        tie_word_embeddings=False,
        architectures=["JanusForConditionalGeneration"],
    )
    config.dtype = dtype
    return config


def _text_config(original: OriginalConfig, token_ids: dict[str, int]) -> LlamaConfig:
    language = original.get("language_config", dict)
    original.expect("language_config.model_type", str, "llama", default="llama")
    if language.get("tie_word_embeddings"):
        raise UserError(
            f"{original.where}: language_config.tie_word_embeddings is true, but Janus has a head of its own"
        )
    known = {*LlamaConfig.__annotations__, "rope_theta", "rope_scaling"}
    settings = {key: value for key, value in language.items() if key in known and value is not None}
    try:
        return LlamaConfig(**settings | token_ids)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"{original.where}: language_config: {' '.join(str(error).split())}") from error


def _vision_config(original: OriginalConfig) -> JanusVisionConfig:
    original.expect("vision_config.cls", str, "CLIPVisionTower")
    for key in ("pixel_mean", "pixel_std"):
        if original.get("vision_config.params", dict).get(key) is not None:
            raise UserError(
                f"{original.where}: vision_config.params.{key} is set; transformers' Janus has no such layer"
            )
    tower = VISION_TOWERS[original.expect("vision_config.params.model_name", str, *VISION_TOWERS)]
    select = original.get("vision_config.params.select_layer", int, -1)
    depth = tower["num_hidden_layers"]
    # Counted from the end, -1 being the last layer; the original then builds only as many layers as it reads.
    layers = min(depth, depth + select + 1 if select <= 0 else select)
    size = original.get("vision_config.params.image_size", int)
    original.expect("aligner_config.cls", str, "MlpProjector")
    original.expect("aligner_config.params.projector_type", str, "mlp_gelu")
    original.expect("aligner_config.params.input_dim", int, tower["hidden_size"])
    return JanusVisionConfig(
        **tower | {"num_hidden_layers": layers},
        image_size=size,
        num_image_tokens=(size // tower["patch_size"]) ** 2,
        projection_dim=original.get("aligner_config.params.n_embed", int),
        depth=original.get("aligner_config.params.depth", int, 1),
    )


def _vq_config(original: OriginalConfig, hidden_size: int) -> JanusVQVAEConfig:
    model = VQ_MODELS[original.expect("gen_vision_config.cls", str, *VQ_MODELS)]
    codes = original.get("gen_vision_config.params.image_token_size", int)
    width = original.get("gen_vision_config.params.n_embed", int)
    original.expect("gen_aligner_config.cls", str, "MlpProjector")
    original.expect("gen_aligner_config.params.projector_type", str, "mlp_gelu")
    original.expect("gen_aligner_config.params.input_dim", int, width)
    original.expect("gen_aligner_config.params.n_embed", int, hidden_size)
    original.expect("gen_head_config.cls", str, "vision_head")
    original.expect("gen_head_config.params.n_embed", int, hidden_size)
    # transformers has one size for the aligner's output and the head's hidden layer.
    original.expect("gen_head_config.params.image_token_embed", int, hidden_size)
    original.expect("gen_head_config.params.image_token_size", int, codes)
    return JanusVQVAEConfig(
        **model,
        embed_dim=width,
        num_embeddings=codes,
        projection_dim=hidden_size,
        num_hidden_layers=original.get("gen_aligner_config.params.depth", int, 1),
        image_token_embed_dim=hidden_size,
    )
