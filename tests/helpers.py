"""A random Janus small enough to run on any machine in milliseconds, in fastcorl's dress and in transformers' own."""

from functools import cache
from zlib import crc32

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from fastcorl.algorithm import ObjectiveOptions
from fastcorl.model import Policy, PromptEncoder
from fastcorl.model.attention import IMPLEMENTATION
from fastcorl.quickstart.warm_start.architecture import (
    BEGIN_IMAGE,
    BOS,
    CHAT_TEMPLATE,
    END_IMAGE,
    EOS,
    IMAGE,
    PAD,
    ROLES,
    SPECIAL_TOKENS,
    generation_config,
    join_configs,
)
from fastcorl.records import Prompt

IMAGE_SIZE = 16
NUM_IMAGE_TOKENS = 16
HIDDEN_SIZE = 64
NUM_CODES = 400  # more than there are words, so that a code taken for a word is noticed

# Captions and questions of very different lengths.
SENTENCES = [
    ("a red 3", "which digit?"),
    ("two blue digits on a yellow square", "what is left of the 4? answer with one word, please"),
    ("5", "how many digits are there? (A) one (B) two (C) three (D) four"),
    ("a green 7 above a red 1 above a blue 0", "is it red?"),
    ("the 9 is to the right of the 8 and it is very, very large", "name all colours from left to right"),
]


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Janus's special tokens, learnt on SENTENCES."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + text for pair in SENTENCES for text in pair], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE},
        additional_special_tokens=ROLES,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(*, use_default_system_prompt: bool = False) -> JanusProcessor:
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        min_size=4,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.5, 0.4, 0.3],
    )
    return JanusProcessor(
        image_processor,
        make_tokenizer(),
        chat_template=CHAT_TEMPLATE,
        use_default_system_prompt=use_default_system_prompt,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )


def janus_config() -> JanusConfig:
    tokenizer = make_tokenizer()
    text = {
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # Janus-Pro has as many as query heads; fewer is the harder case
        "max_position_embeddings": 512,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "mlp_ratio": 2.0,
        "num_image_tokens": NUM_IMAGE_TOKENS,
    }
    vq = {
        "embed_dim": 8,
        "num_embeddings": NUM_CODES,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "num_patches": 4,
    }
    return join_configs(tokenizer, HIDDEN_SIZE, text=text, vision=vision, vq=vq)


@torch.no_grad()
def make_janus() -> JanusForConditionalGeneration:
    """Random weights, scaled so that distributions are far from flat, depend on the prompt, and answers end now and
    then; the image placeholder is never answered."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)  # for what is not drawn below: biases, norms and the VQ model
    janus = JanusForConditionalGeneration(janus_config()).eval()
    janus.generation_config = generation_config(tokenizer)
    for name, parameter in janus.named_parameters():
        if parameter.ndim == 2 and "vqmodel" not in name:
            generator = torch.Generator().manual_seed(crc32(name.encode()))  # of its own: shapes are free to change
            scale = 1 if "embed" in name else 1 / parameter.shape[1] ** 0.5
            parameter.normal_(0, scale, generator=generator)
    janus.lm_head.weight.mul_(2.5)
    janus.model.generation_head.vision_head.weight.mul_(2)
    janus.lm_head.weight[tokenizer.eos_token_id] *= 2
    janus.lm_head.weight[tokenizer.convert_tokens_to_ids(IMAGE)] = 0
    return janus


def make_policy() -> Policy:
    janus = make_janus()
    janus.model.language_model.set_attn_implementation(IMPLEMENTATION)
    processor = make_processor()
    return Policy(janus, processor, PromptEncoder(processor)).eval()


def make_reference() -> JanusForConditionalGeneration:
    """The same weights in a model that knows nothing of fastcorl."""
    janus = make_janus()
    janus.set_attn_implementation("eager")
    return janus


def make_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (len(SENTENCES), 20, 24, 3), generator=generator, dtype=torch.uint8)
    return [
        Prompt(f"prompt-{i}", caption, Image.fromarray(pixels[i].numpy()), question, "<answer>A</answer>", "MC")
        for i, (caption, question) in enumerate(SENTENCES)
    ]


def objective_options(**changes) -> ObjectiveOptions:
    settings = {
        "temperature": 1.0,
        "guidance": 1.0,
        "policy_logits": "cond",
        "loss_type": "grpo",
        "importance": "token",
        "eps_low": None,
        "eps_high": None,
        "beta": 0.0,
        "max_lengths": {"image": NUM_IMAGE_TOKENS, "text": 24},
    }
    return ObjectiveOptions(**settings | changes)


def published_text_inputs(policy: Policy, prompt: Prompt) -> dict[str, torch.Tensor]:
    """A question as transformers' own processor prepares it."""
    content = [{"type": "image"}, {"type": "text", "text": prompt.question}]
    text = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return dict(policy.processor(text=text, images=[prompt.image], return_tensors="pt"))


def published_draw_ids(policy: Policy, prompt: Prompt) -> torch.Tensor:
    """(L,) ids of a drawing prompt as transformers' own processor prepares it."""
    content = [{"type": "text", "text": prompt.caption}]
    text = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return policy.processor(text=text, generation_mode="image", return_tensors="pt")["input_ids"][0]


def unconditional_ids(policy: Policy, prompt_ids: torch.Tensor) -> torch.Tensor:
    """The drawing prompt with all but its ends padded out."""
    ids = prompt_ids.clone()
    ids[1:-1] = policy.processor.tokenizer.pad_token_id
    return ids


@torch.no_grad()
def image_hidden(
    reference: JanusForConditionalGeneration, prompt_ids: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """(L + T, hidden) final hidden states of one drawing prompt followed by all its codes."""
    text = reference.get_input_embeddings()(prompt_ids)
    drawn = reference.prepare_embeddings_for_image_generation(codes)
    inputs = torch.cat([text, drawn])[None]
    return reference.model.language_model(inputs_embeds=inputs).last_hidden_state[0]


@torch.no_grad()
def image_logits(
    reference: JanusForConditionalGeneration, prompt_ids: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """(T, V): the distribution that each of the codes was drawn from."""
    hidden = image_hidden(reference, prompt_ids, codes)
    return reference.model.generation_head(hidden[len(prompt_ids) - 1 : -1])


@torch.no_grad()
def text_logits(
    reference: JanusForConditionalGeneration, inputs: dict[str, torch.Tensor], answer: torch.Tensor
) -> torch.Tensor:
    """(A, V): the distribution that each token of the answer was drawn from."""
    ids = torch.cat([inputs["input_ids"][0], answer[:-1]])[None]
    logits = reference(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    return logits[inputs["input_ids"].shape[1] - 1 :]
