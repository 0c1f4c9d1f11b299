"""Supervised start of the policy: draws captions it is given and answers questions, both only half learned."""

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration, JanusProcessor, JanusVQVAE

from fastcorl.model.policy import Policy
from fastcorl.model.prompts import PromptEncoder
from fastcorl.quickstart.grammar import Question
from fastcorl.quickstart.scenes import Scene
from fastcorl.quickstart.warm_start.architecture import generation_config, janus_config
from fastcorl.quickstart.warm_start.batches import scene_batches, to_pixels
from fastcorl.records import PackedBatch

UNCONDITIONAL = 0.1
TAGGED = 0.5


class Cycle(NamedTuple):
    """One warm-up and decay of the learning rate. `thoughts`: whether untagged answers keep their reasoning."""

    steps: int
    peak_learning_rate: float
    thoughts: bool
    drawings: int  # per step
    answers: int


def answer_text(question: Question, rng: random.Random, *, thoughts: bool) -> str:
    """The solution, with probability 1 - TAGGED without its tags: the format is one of the things left to learn."""
    if rng.random() < TAGGED:
        return question.solution
    thought, answer = question.solution.removeprefix("<think>").removesuffix("</answer>").split("</think><answer>")
    return f"{thought}. {answer}" if thoughts else answer


def training_pack(
    policy: Policy, scenes: list[Scene], codes: torch.Tensor, rng: random.Random, *, thoughts: bool
) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    """A pack that draws the first scenes, those with `codes`, and answers about the others.

    Returns the pack and, over its positions, the target image codes and target text ids (-100 where there is none).
    """
    encoder = policy.encoder
    ids: list[list[int]] = []
    first_targets: list[int] = []  # per sequence, where its sampled part starts
    num_drawings = len(codes)
    for scene, row in zip(scenes[:num_drawings], codes.tolist(), strict=True):
        prompt = encoder.draw(scene.caption)
        if rng.random() < UNCONDITIONAL:
            prompt = encoder.unconditional(len(prompt))
        ids.append(prompt + row)
        first_targets.append(len(prompt))
    for scene in scenes[num_drawings:]:
        prompt = encoder.ask(scene.question.problem)
        answer = encoder.tokenizer(answer_text(scene.question, rng, thoughts=thoughts), add_special_tokens=False)[
            "input_ids"
        ]
        ids.append(prompt + answer + [encoder.eos_id])
        first_targets.append(len(prompt))
    lengths = torch.tensor([len(row) for row in ids])
    token_ids = torch.tensor([token for row in ids for token in row])
    sequence = torch.repeat_interleave(torch.arange(len(ids)), lengths)
    position_ids = torch.cat([torch.arange(length) for length in lengths.tolist()])
    sampled = position_ids >= torch.tensor(first_targets)[sequence]
    is_code = sampled & (sequence < num_drawings)
    # The target of a position is the token behind it.
    targets = token_ids.roll(-1)
    code_targets = targets.masked_fill(~is_code.roll(-1), -100)
    text_targets = targets.masked_fill(~(sampled & ~is_code).roll(-1), -100)
    vision_positions = ((token_ids == encoder.image_id) & ~is_code).nonzero().squeeze(-1)
    pixels = to_pixels([scene.image for scene in scenes[num_drawings:]])
    features = policy.janus.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)
    pack = PackedBatch(
        token_ids=token_ids,
        is_image_code=is_code,
        position_ids=position_ids,
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
        vision_positions=vision_positions,
        vision_rows=torch.arange(len(vision_positions)),
        vision_features=features,
        image=None,
        text=None,
    )
    return pack, code_targets, text_targets


def make_janus(processor: JanusProcessor, vq: JanusVQVAE, seed: int) -> JanusForConditionalGeneration:
    """A fresh Janus around a trained VQ model, whose codes are its generation embeddings."""
    torch.manual_seed(seed)
    janus = JanusForConditionalGeneration(janus_config(processor.tokenizer))
    janus.generation_config = generation_config(processor.tokenizer)
    janus.model.vqmodel.load_state_dict(vq.state_dict())
    with torch.no_grad():
        janus.model.generation_embeddings.weight.copy_(vq.quantize.embedding.weight)
    return janus


def train_language(
    janus: JanusForConditionalGeneration,
    processor: JanusProcessor,
    cycles: Sequence[Cycle],
    *,
    seed: int = 0,
    log=print,
) -> None:
    """Train everything but the VQ model in place, on drawings and answers together."""
    janus.model.language_model.set_attn_implementation("fastcorl")
    policy = Policy(janus, processor, PromptEncoder(processor))
    janus.requires_grad_(True)
    janus.model.vqmodel.requires_grad_(False)
    janus.model.generation_embeddings.requires_grad_(False)
    for number, cycle in enumerate(cycles):
        _run_cycle(policy, cycle, seed + number, log)
    janus.eval()


def _run_cycle(policy: Policy, cycle: Cycle, seed: int, log) -> None:
    vq = policy.janus.model.vqmodel
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=cycle.peak_learning_rate, total_steps=cycle.steps, pct_start=0.05
    )
    rng = random.Random(seed)
    start = time.time()
    for step, scenes in zip(
        range(cycle.steps), scene_batches(cycle.drawings + cycle.answers, 100 * seed), strict=False
    ):
        with torch.no_grad():
            pixels = to_pixels([scene.image for scene in scenes[: cycle.drawings]])
            codes = vq.encode(pixels, return_dict=True).image_tokens.view(len(pixels), -1)
        pack, code_targets, text_targets = training_pack(policy, scenes, codes, rng, thoughts=cycle.thoughts)
        hidden = policy.hidden_states(pack)
        code_rows, text_rows = (targets >= 0 for targets in (code_targets, text_targets))
        code_logits = policy.image_head(policy.image_head_input(hidden[code_rows]))
        image_loss = F.cross_entropy(code_logits, code_targets[code_rows])
        text_loss = F.cross_entropy(policy.text_head(hidden[text_rows]), text_targets[text_rows])
        optimizer.zero_grad()
        (image_loss + text_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            elapsed = time.time() - start
            log(f"policy {step + 1}/{cycle.steps} image {image_loss:.4f} text {text_loss:.4f} ({elapsed:.0f} s)")
