"""Sizes of the quickstart's Janus and BLIP, and the tokenizer and processor files that go with them.

Everything is in the transformers format with Janus-Pro's special tokens and prompt layout, so the code that loads
`deepseek-community/Janus-Pro-1B` loads this model too.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BlipConfig,
    BlipTextConfig,
    BlipVisionConfig,
    GenerationConfig,
    JanusConfig,
    JanusProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from fastcorl.quickstart.scenes import IMAGE_SIZE, make_scene

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_IMAGE, END_IMAGE, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
ROLES = ["<|User|>", "<|Assistant|>"]
SPECIAL_TOKENS = [BOS, EOS, PAD, BEGIN_IMAGE, END_IMAGE, IMAGE, *ROLES]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
NUM_IMAGE_TOKENS = 64
HIDDEN_SIZE = 192

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the task's sentences: any text round-trips, the task's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    scenes = [make_scene(0, index, "train") for index in range(2000)]
    corpus: list[str] = []
    for scene in scenes:
        question = scene.question
        answer = f"<think>{question.thought}</think><answer>{question.answer}</answer>"
        corpus += [" " + scene.caption, question.problem, answer]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS + TAGS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # The tags are whole tokens but not special ones: decoding an answer must keep them.
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE},
        additional_special_tokens=ROLES,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return fast


def make_processor(tokenizer: PreTrainedTokenizerFast) -> JanusProcessor:
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        min_size=4,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return JanusProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=NUM_IMAGE_TOKENS)


# 8 x 8 tokens of a 256 x 8 codebook; the group norms of Janus's VQ ask for multiples of 32 channels.
VQ_SIZES = {
    "embed_dim": 8,
    "num_embeddings": 256,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "num_patches": 8,
}


def vq_config() -> JanusVQVAEConfig:
    return _vq_config(HIDDEN_SIZE, VQ_SIZES)


def _vq_config(hidden_size: int, sizes: Mapping[str, Any]) -> JanusVQVAEConfig:
    return JanusVQVAEConfig(projection_dim=hidden_size, image_token_embed_dim=hidden_size, **sizes)


def join_configs(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    vq: Mapping[str, Any],
) -> JanusConfig:
    """A Janus of parts of these sizes; what they must agree on, widths and special tokens, is filled in."""
    agreed = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    return JanusConfig(
        text_config=LlamaConfig(**agreed | text),
        vision_config=JanusVisionConfig(projection_dim=hidden_size, **vision),
        vq_config=_vq_config(hidden_size, vq),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )


def janus_config(tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    text = {
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 512,
    }
    vision = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "mlp_ratio": 3.0,
        "num_image_tokens": NUM_IMAGE_TOKENS,
    }
    return join_configs(tokenizer, HIDDEN_SIZE, text=text, vision=vision, vq=VQ_SIZES)


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(BEGIN_IMAGE)},
    )


def blip_config(tokenizer: PreTrainedTokenizerFast) -> BlipConfig:
    """A captioner of about half a million parameters that shares the policy's tokenizer."""
    size = 96
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        encoder_hidden_size=size,
        intermediate_size=3 * size,
        projection_dim=size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        sep_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        label_smoothing=0.0,
    )
    vision = BlipVisionConfig(
        hidden_size=size,
        intermediate_size=3 * size,
        projection_dim=size,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_act="gelu",
        initializer_range=0.02,  # transformers' default of 1e-10 expects pretrained weights
    )
    return BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=size, image_text_hidden_size=size
    )
