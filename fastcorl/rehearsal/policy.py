"""A Janus of about 20 million random weights, with Janus-Pro's special tokens, image geometry and files."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from fastcorl.model.loading import QUICKSTART_WEIGHTS
from fastcorl.quickstart.warm_start.architecture import CHAT_TEMPLATE, TAGS, generation_config, join_configs

IMAGE_SIZE, PATCH_SIZE = 384, 16
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
HIDDEN_SIZE, VISION_SIZE, CODEBOOK_SIZE = 384, 192, 16384
VOCABULARY_SIZE = 1024


def make_processor(texts: Sequence[str]) -> JanusProcessor:
    """The processor, its tokenizer learnt on `texts`."""
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, min_size=14, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(
        image_processor,
        _make_tokenizer(texts),
        chat_template=CHAT_TEMPLATE,
        use_default_system_prompt=True,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )


def _make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of the quickstart's, which are Janus-Pro's."""
    pattern = AutoTokenizer.from_pretrained(QUICKSTART_WEIGHTS / "janus")
    tokenizer = pattern.train_new_from_iterator([list(texts)], VOCABULARY_SIZE, show_progress=False)
    tokenizer.add_tokens(TAGS)  # Janus-Pro spells them in pieces, of which random answers would seldom make a whole
    return tokenizer


def janus_config(tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    text = {
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 16384,
    }
    vision = {
        "hidden_size": VISION_SIZE,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "num_image_tokens": NUM_IMAGE_TOKENS,
    }
    vq = {
        "embed_dim": 8,
        "num_embeddings": CODEBOOK_SIZE,
        "latent_channels": 64,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 1,
        "num_patches": IMAGE_SIZE // PATCH_SIZE,
    }
    return join_configs(tokenizer, HIDDEN_SIZE, text=text, vision=vision, vq=vq)


@torch.no_grad()
def make_janus(processor: JanusProcessor, seed: int) -> JanusForConditionalGeneration:
    """Random weights whose outputs depend on their inputs: layers keep the size of what passes through them, which
    transformers' initial weights do not."""
    torch.manual_seed(seed)
    janus = JanusForConditionalGeneration(janus_config(processor.tokenizer)).eval()
    janus.generation_config = generation_config(processor.tokenizer)
    for module in janus.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
    return janus
