"""How the `multi_modality` layout, in which Janus and its descendants are published, names the tensors of a Janus."""

import re

import torch

# Original name, transformers' name; the first row that fits counts. # is a number, * the rest of the name.
_ROWS = (
    ("vision_model.vision_tower.pos_embed", "model.vision_model.embeddings.position_embedding.weight"),
    ("vision_model.vision_tower.patch_embed.proj.*", "model.vision_model.embeddings.patch_embedding.*"),
    ("vision_model.vision_tower.blocks.#.norm1.*", "model.vision_model.encoder.layers.#.layer_norm1.*"),
    ("vision_model.vision_tower.blocks.#.norm2.*", "model.vision_model.encoder.layers.#.layer_norm2.*"),
    (
        "vision_model.vision_tower.blocks.#.attn.proj.*",
        "model.vision_model.encoder.layers.#.self_attn.projection_layer.*",
    ),
    ("vision_model.vision_tower.blocks.#.mlp.*", "model.vision_model.encoder.layers.#.mlp.*"),
    ("vision_model.vision_tower.norm.*", "model.vision_model.post_layernorm.*"),
    ("gen_vision_model.encoder.conv_blocks.#.res.*", "model.vqmodel.encoder.down.#.block.*"),
    ("gen_vision_model.encoder.conv_blocks.*", "model.vqmodel.encoder.down.*"),
    ("gen_vision_model.decoder.conv_blocks.#.res.*", "model.vqmodel.decoder.up.#.block.*"),
    ("gen_vision_model.decoder.conv_blocks.*", "model.vqmodel.decoder.up.*"),
    ("gen_vision_model.encoder.mid.0.*", "model.vqmodel.encoder.mid.block_1.*"),
    ("gen_vision_model.encoder.mid.1.*", "model.vqmodel.encoder.mid.attn_1.*"),
    ("gen_vision_model.encoder.mid.2.*", "model.vqmodel.encoder.mid.block_2.*"),
    ("gen_vision_model.decoder.mid.0.*", "model.vqmodel.decoder.mid.block_1.*"),
    ("gen_vision_model.decoder.mid.1.*", "model.vqmodel.decoder.mid.attn_1.*"),
    ("gen_vision_model.decoder.mid.2.*", "model.vqmodel.decoder.mid.block_2.*"),
    ("gen_vision_model.*", "model.vqmodel.*"),
    ("gen_embed.weight", "model.generation_embeddings.weight"),
    ("gen_head.output_mlp_projector.*", "model.generation_head.proj_out.*"),
    ("gen_head.vision_head.*", "model.generation_head.vision_head.*"),
    ("language_model.model.*", "model.language_model.*"),
    ("language_model.lm_head.weight", "lm_head.weight"),
)

# Nothing that Janus computes depends on these: pooling that its vision tower skips, a count kept while the codebook was
# trained, and rotary frequencies that follow from the configuration.
_UNUSED = (
    "vision_model.vision_tower.attn_pool.*",
    "gen_vision_model.quantize.codebook_used",
    "language_model.model.layers.#.self_attn.rotary_emb.inv_freq",
)


def _pattern(row: str) -> re.Pattern[str]:
    return re.compile(re.escape(row).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _replacement(row: str) -> str:
    numbers = iter(range(1, 10))
    return re.sub(r"[#*]", lambda _: rf"\{next(numbers)}", row)


_RENAMES = tuple((_pattern(original), _replacement(ours)) for original, ours in _ROWS)
_UNUSED_PATTERNS = tuple(_pattern(row) for row in _UNUSED)
_FUSED = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_ALIGNER = re.compile(r"(gen_)?aligner\.layers\.(\d+)\.(weight|bias)")


def is_unused(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in _UNUSED_PATTERNS)


def target_names(name: str) -> tuple[str, ...]:
    """An original tensor in transformers: one name, three for a fused query-key-value, none if it is unknown."""
    if fused := _FUSED.fullmatch(name):
        layer, kind = fused.groups()
        return tuple(f"model.vision_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
    if aligner := _ALIGNER.fullmatch(name):
        generation, index, kind = aligner.groups()
        # A sequence of linear layers with an activation, which has no tensors, between each two.
        layer, odd = divmod(int(index), 2)
        module = "model.generation_aligner" if generation else "model.aligner"
        return () if odd else (f"{module}.hidden_layers.{layer - 1}.{kind}" if layer else f"{module}.fc1.{kind}",)
    for pattern, replacement in _RENAMES:
        if pattern.fullmatch(name):
            return (pattern.sub(replacement, name),)
    return ()


def to_transformers(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that an original one becomes, as views of it; none if the name is unknown."""
    names = target_names(name)
    if len(names) == 3:
        return dict(zip(names, torch.atleast_1d(tensor).tensor_split(3), strict=True))
    # Positions have a dimension for the batch there.
    return {target: tensor.squeeze(0) if name.endswith(".pos_embed") else tensor for target in names}


def from_transformers(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The inverse of `to_transformers`: one original tensor from the tensors of a transformers checkpoint."""
    parts = [tensors[target] for target in target_names(name)]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    return tensor.unsqueeze(0) if name.endswith(".pos_embed") else tensor
