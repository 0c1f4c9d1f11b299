"""Tokenizer, processor and generation settings of a `multi_modality` checkpoint, as transformers' Janus has them."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from fastcorl.errors import UserError
from fastcorl.model.weight_files import read_json

# The original's "deepseek" conversation, as text that transformers' processor renders. A message is a list of parts;
# an image stands on a line of its own, texts that follow one another are joined by a space.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = message['content'] -%}
{%- set role = message['role'] | lower -%}
{%- if role == 'user' -%}
{{- '<|User|>: ' -}}
{%- elif role == 'assistant' -%}
{%- set begun = loop.last and not add_generation_prompt and parts[0]['type'] == 'text' and parts[0]['text'] == '' -%}
{{- '<|Assistant|>:' if begun else '<|Assistant|>: ' -}}
{%- else -%}
{{- message['role'].capitalize() + ': ' -}}
{%- endif -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
{{- ('' if loop.first else '\\n') + '<image_placeholder>' + ('' if loop.last else '\\n') -}}
{%- elif part['type'] == 'text' -%}
{%- set text = part['text'].lstrip() if loop.first else part['text'] -%}
{%- set text = text.rstrip() if loop.last else text -%}
{{- ' ' + text if not loop.first and loop.previtem['type'] == 'text' else text -}}
{%- endif -%}
{%- endfor -%}
{%- if not loop.last or add_generation_prompt -%}
{{- '\\n\\n' if role == 'user' else '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|Assistant|>:' -}}
{%- endif -%}
"""

# What the original's VLChatProcessor takes for what processor_config.json leaves out.
_DEFAULTS = {
    "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
    "pad_tag": "<｜▁pad▁｜>",
}


def load_processor(folder: Path, *, image_size: int, num_image_tokens: int) -> JanusProcessor:
    """The processor with its tokenizer. Raises UserError where a file or a special token is missing, or where the
    processor is for other images than the model (`image_size` pixels, `num_image_tokens` features)."""
    path = folder / "processor_config.json"
    settings = read_json(path) if path.exists() else {}
    tags = {key: settings.get(key) or default for key, default in _DEFAULTS.items()}
    if settings.get("num_image_tokens", 576) != num_image_tokens:
        raise UserError(
            f"{path}: num_image_tokens is {settings.get('num_image_tokens', 576)}, but the model has {num_image_tokens}"
        )
    template = _own_template(folder)
    if template is None:
        if settings.get("sft_format", "deepseek") != "deepseek":
            raise UserError(
                f"{path}: sft_format is {settings['sft_format']!r}; only 'deepseek' is known: write the conversation "
                f"format to {folder / 'chat_template.jinja'}"
            )
        template = CHAT_TEMPLATE.replace("<image_placeholder>", tags["image_tag"])
    processor = JanusProcessor(
        _image_processor(folder / "preprocessor_config.json", image_size),
        load_tokenizer(folder, tags),
        chat_template=template,
        use_default_system_prompt=True,
        num_image_tokens=num_image_tokens,
    )
    _check_template(processor, folder)
    return processor


def load_tokenizer(folder: Path, tags: dict[str, str]) -> PreTrainedTokenizerFast:
    """tokenizer.json as it is, with the special tokens of tokenizer_config.json and special_tokens_map.json.

    The declared class, LlamaTokenizerFast, is not used: transformers 5 gives it a pre-tokenizer of its own, which is
    wrong for Janus's byte-level vocabulary. The padding token is the processor's, as in the original, which pads the
    unconditional prompt with it.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; it belongs to the checkpoint")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UserError(f"{path}: cannot be read as a tokenizer ({' '.join(str(error).split())})") from error
    config = read_json(folder / "tokenizer_config.json")
    special_path = folder / "special_tokens_map.json"
    special = (read_json(special_path) if special_path.exists() else {}) | {
        key: value for key, value in config.items() if value is not None
    }
    names = {key: _content(special.get(key)) for key in ("bos_token", "eos_token")}
    needed = names | tags
    for key, token in needed.items():
        if token is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: lacks {key}")
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: has no token {token!r} ({key})")
    if config.get("tokenizer_class", "LlamaTokenizerFast").removesuffix("Fast") == "LlamaTokenizer":
        _add_ends(tokenizer, names, config)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        pad_token=tags["pad_tag"],
        extra_special_tokens={
            "image_token": tags["image_tag"],
            "boi_token": tags["image_start_tag"],
            "eoi_token": tags["image_end_tag"],
        },
        additional_special_tokens=[_content(token) for token in special.get("additional_special_tokens") or []],
        model_max_length=config.get("model_max_length"),
        padding_side="left",
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
    )


def generation_config(processor: JanusProcessor) -> GenerationConfig:
    """What transformers' `generate` needs to draw; guidance is the original's."""
    tokenizer = processor.tokenizer
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(processor.image_start_token)},
    )


def _content(token: Any) -> str | None:
    """A token is written as text or as an object with its text in it."""
    return token.get("content") if isinstance(token, dict) else token


def _add_ends(tokenizer: Tokenizer, names: dict[str, str], config: dict[str, Any]) -> None:
    """Put the begin or end token around a text as LlamaTokenizerFast does, whatever tokenizer.json says."""
    begin = [names["bos_token"]] if config.get("add_bos_token", True) else []
    end = [names["eos_token"]] if config.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*begin, *end}],
    )


def _image_processor(path: Path, image_size: int) -> JanusImageProcessorPil:
    settings = read_json(path)
    if settings.get("image_size") != image_size:
        raise UserError(f"{path}: image_size is {settings.get('image_size')}, but the model's is {image_size}")
    names = ("image_mean", "image_std", "min_size", "rescale_factor", "do_normalize")
    known = {name: settings[name] for name in names if settings.get(name) is not None}
    return JanusImageProcessorPil(size={"height": image_size, "width": image_size}, **known)


def _own_template(folder: Path) -> str | None:
    """The processor's template. One in tokenizer_config.json is for text alone and not meant."""
    jinja, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.exists():
        return jinja.read_text()
    return read_json(wrapped).get("chat_template") if wrapped.exists() else None


def _check_template(processor: JanusProcessor, folder: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}]
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: its chat template fails on an image and a question ({error})") from error
    if text.count(processor.image_token) != 1 or text.count("which?") != 1:
        raise UserError(f"{folder}: its chat template loses the image or the question; it renders {text!r}")
