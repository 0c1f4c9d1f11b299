"""Models, prompts and amounts of the rollout benchmarks: the quickstart's own model, and random ones of larger sizes.

No end token ends an answer, on either side, so that everyone decodes the same number of tokens.
"""

from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForImageTextToText, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from bench.goals import SINGLE, WHOLE
from fastcorl.data import PromptData, load_rows
from fastcorl.model import Policy, PromptEncoder, load_policy
from fastcorl.model.attention import IMPLEMENTATION
from fastcorl.quickstart.warm_start.architecture import CHAT_TEMPLATE, generation_config, join_configs, make_tokenizer

GROUP_SIZE = 8
GUIDANCE = 5.0


@dataclass(frozen=True)
class Workload:
    """``kind`` is "images", "answers", or "mixed": a drawing and an answer for every row, in one call.

    ``peers`` are those of drawings or answers alone; at a billion parameters one takes half a minute a round.
    """

    model: str
    kind: str
    prompts: int
    answer_tokens: int = 1
    rounds: int = 2
    peers: tuple[str, ...] = (WHOLE, SINGLE)
    device: str = "cpu"

    @property
    def draws(self):
        return self.kind != "answers"

    @property
    def answers(self):
        return self.kind != "images"

    @property
    def rows(self):
        return self.prompts * GROUP_SIZE


WORKLOADS = {
    "quickstart images": Workload("quickstart", "images", 8, rounds=3),
    "quickstart answers": Workload("quickstart", "answers", 8, answer_tokens=32, rounds=3),
    "quickstart mixed": Workload("quickstart", "mixed", 8, answer_tokens=32, rounds=3),
    "quickstart mixed, one prompt": Workload("quickstart", "mixed", 1, answer_tokens=32, rounds=3),
    "91M images": Workload("91M", "images", 2),
    "91M answers": Workload("91M", "answers", 2, answer_tokens=64),
    "91M mixed, one prompt": Workload("91M", "mixed", 1, answer_tokens=64),
    "Janus-Pro-1B, 64 images": Workload("Janus-Pro-1B", "images", 8, peers=(WHOLE,), device="cuda"),
    "Janus-Pro-1B, 128 images": Workload("Janus-Pro-1B", "images", 16, peers=(), device="cuda"),
    "Janus-Pro-1B, 128 answers": Workload(
        "Janus-Pro-1B", "answers", 16, answer_tokens=256, peers=(WHOLE,), device="cuda"
    ),
    "Janus-Pro-1B, mixed": Workload("Janus-Pro-1B", "mixed", 16, answer_tokens=256, device="cuda"),
}


@dataclass(frozen=True)
class Size:
    """A Llama backbone with heads of 64 or more; ``grid`` is a side of the image in tokens, of ``patch`` pixels."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int  # rows of the embedding, of which the tokenizer knows the first few
    grid: int
    patch: int
    vision: dict
    vq: dict
    repeats: int = 1  # of the question, for its length


SIZES = {
    "91M": Size(
        hidden=768,
        layers=12,
        heads=12,
        intermediate=2048,
        vocabulary=32768,
        grid=8,
        patch=4,
        vision=dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2.0),
        vq=dict(latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1),
    ),
    "Janus-Pro-1B": Size(
        hidden=2048,
        layers=24,
        heads=16,
        intermediate=5632,
        vocabulary=102400,
        grid=24,
        patch=16,
        vision=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, mlp_ratio=4.0),
        vq={},
        repeats=4,
    ),
}


def make_policy(model, device):
    """The shipped quickstart in float32; a model with random weights in float32 on a CPU and in bfloat16 on a GPU."""
    policy = load_policy(model) if model == "quickstart" else _random_policy(SIZES[model], device)
    policy.encoder.eos_id = -1
    return policy


def make_prompts(workload):
    rows = PromptData(load_rows("fastcorl.quickstart.data:held_out"))
    repeats = SIZES[workload.model].repeats if workload.model in SIZES else 1
    prompts = [rows[index] for index in range(workload.prompts)]
    return [replace(prompt, question=" ".join([prompt.question] * repeats)) for prompt in prompts]


def _random_policy(size, device):
    tokenizer = make_tokenizer()
    pixels = size.grid * size.patch
    image_processor = JanusImageProcessorPil(
        size={"height": pixels, "width": pixels}, min_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = JanusProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=size.grid**2)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        janus = AutoModelForImageTextToText.from_config(_config(size, tokenizer), dtype=dtype)
    janus.generation_config = generation_config(tokenizer)
    janus.model.language_model.set_attn_implementation(IMPLEMENTATION)
    return Policy(janus, processor, PromptEncoder(processor)).eval()


def _config(size, tokenizer):
    text = {
        "vocab_size": size.vocabulary,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 2048,
    }
    vision = {
        "image_size": size.grid * size.patch,
        "patch_size": size.patch,
        "num_image_tokens": size.grid**2,
        **size.vision,
    }
    return join_configs(tokenizer, size.hidden, text=text, vision=vision, vq=size.vq)
