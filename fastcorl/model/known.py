"""Sizes of the published Janus-Pro models, so that a run can be planned before anything is downloaded."""

from transformers import JanusConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

# Of the language models (config.json of deepseek-ai/Janus-Pro-1B and -7B); towers and VQ model are the same in both.
_BACKBONES = {
    "deepseek-community/Janus-Pro-1B": (2048, 5632, 24, 16),
    "deepseek-community/Janus-Pro-7B": (4096, 11008, 30, 32),
}
KNOWN_MODELS = tuple(_BACKBONES)


def known_config(name: str) -> JanusConfig | None:
    """The architecture of a published model by its hub name; None for any other."""
    if name not in _BACKBONES:
        return None
    hidden, intermediate, layers, heads = _BACKBONES[name]
    text = LlamaConfig(
        vocab_size=102400,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=16384,
        bos_token_id=100000,
        eos_token_id=100001,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(projection_dim=hidden)
    vq = JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden)
    return JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=100581, tie_word_embeddings=False
    )
