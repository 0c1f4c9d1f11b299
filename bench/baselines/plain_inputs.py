"""Prompts as transformers' own Janus processor prepares them: padded on the left to the longest."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import BatchFeature, JanusForConditionalGeneration, JanusProcessor

from fastcorl.records import Prompt


@dataclass(frozen=True)
class PlainInputs:
    """Of P prompts: `draw` has input_ids and attention_mask (P, L), `ask` also pixel_values (P, 3, H, W)."""

    draw: BatchFeature
    ask: BatchFeature


def prepare(janus: JanusForConditionalGeneration, processor: JanusProcessor, prompts: Sequence[Prompt]) -> PlainInputs:
    """Drawing prompts of the captions, and the questions about the images, on the model's device in its dtype."""
    captions = [_chat(processor, [{"type": "text", "text": prompt.caption}]) for prompt in prompts]
    questions = [_chat(processor, [{"type": "image"}, {"type": "text", "text": prompt.question}]) for prompt in prompts]
    images = [prompt.image for prompt in prompts]
    draw, ask = pad(processor, captions, generation_mode="image"), pad(processor, questions, images=images)
    return PlainInputs(draw.to(janus.device), ask.to(janus.device, janus.dtype))


def pad(processor: JanusProcessor, texts: list[str], **options) -> BatchFeature:
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **options)


def _chat(processor: JanusProcessor, content: list[dict[str, str]]) -> str:
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
