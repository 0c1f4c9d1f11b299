"""Supervised start of the policy: draws captions it is given and answers questions, both only half learned."""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration, JanusProcessor, JanusVQVAE

from fastcorl.model.policy import Policy
from fastcorl.model.prompts import PromptEncoder
from fastcorl.quickstart.grammar import Question, ask
from fastcorl.quickstart.scenes import Scene, sample_items
from fastcorl.quickstart.warm_start.architecture import ROLES, generation_config, janus_config
from fastcorl.quickstart.warm_start.batches import scene_batches, to_pixels
from fastcorl.quickstart.warm_start.descent import Descent
from fastcorl.records import PackedBatch

UNCONDITIONAL = 0.1
TAGGED = 0.5


class Cycle(NamedTuple):
    """One warm-up and decay of the learning rate. `concludes`: whether the reasoning says what follows from it."""

    steps: int
    peak_learning_rate: float
    concludes: bool


def answer_text(question: Question, rng: random.Random, *, concludes: bool) -> str:
    """The solution, with probability 1 - TAGGED without its tags: the format is one of the things left to learn."""
    thought = f"{question.thought}, so {question.conclusion}" if concludes else question.thought
    if rng.random() < TAGGED:
        return f"<think>{thought}</think><answer>{question.answer}</answer>"
    return f"{thought}. {question.answer}"


def training_pack(
    policy: Policy, scenes: list[Scene], codes: torch.Tensor, rng: random.Random, *, concludes: bool
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
        text = answer_text(scene.question, rng, concludes=concludes)
        answer = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
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
        code_positions=is_code.nonzero().squeeze(-1),
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
    cycle: Cycle,
    *,
    drawings: int = 24,
    answers: int = 24,
    seed: int = 0,
    log=print,
) -> None:
    """Train the language model, the aligners and the heads in place, on drawings and answers together."""
    janus.model.language_model.set_attn_implementation("fastcorl")
    policy = Policy(janus, processor, PromptEncoder(processor))
    janus.requires_grad_(True)
    vq = janus.model.vqmodel
    for frozen in (vq, janus.model.vision_model, janus.model.generation_embeddings):
        frozen.requires_grad_(False)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    descent = Descent(
        "policy",
        parameters,
        steps=cycle.steps,
        peak_learning_rate=cycle.peak_learning_rate,
        warmup=0.05,
        weight_decay=0.01,
        log=log,
    )
    rng = random.Random(seed)
    for _, scenes in zip(range(cycle.steps), scene_batches(drawings + answers, 100 * seed), strict=False):
        with torch.no_grad():
            pixels = to_pixels([scene.image for scene in scenes[:drawings]])
            codes = vq.encode(pixels, return_dict=True).image_tokens.view(len(pixels), -1)
        pack, code_targets, text_targets = training_pack(policy, scenes, codes, rng, concludes=cycle.concludes)
        hidden = policy.hidden_states(pack)
        code_rows, text_rows = (targets >= 0 for targets in (code_targets, text_targets))
        code_logits = policy.image_head(policy.image_head_input(hidden[code_rows]))
        image_loss = F.cross_entropy(code_logits, code_targets[code_rows])
        text_loss = F.cross_entropy(policy.text_head(hidden[text_rows]), text_targets[text_rows])
        descent.step(image_loss + text_loss, image=image_loss, text=text_loss)
    janus.eval()


def train_letters(
    janus: JanusForConditionalGeneration,
    processor: JanusProcessor,
    *,
    steps: int,
    rows: int = 192,
    seed: int = 0,
    log=print,
) -> None:
    """Train the language model in place to name the letter of the option that its reasoning has arrived at.

    Text alone, and a loss on nothing but the letter: among the other tokens of `train_language` its signal is too weak.
    """
    model, head, tokenizer = janus.model.language_model, janus.lm_head, processor.tokenizer
    model.set_attn_implementation("sdpa")
    parameters = [*model.parameters(), *head.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    descent = Descent(
        "letters",
        parameters,
        steps=steps,
        peak_learning_rate=1e-3,
        warmup=0.05,
        weight_decay=0.01,
        log=log,
        log_every=20,
    )
    rng = random.Random(seed)
    for _ in range(steps):
        questions = [ask(sample_items(rng), rng, "MC") for _ in range(rows)]
        texts = [f"{q.problem}\n\n{ROLES[1]}:{q.solution.removesuffix(q.answer + '</answer>')}" for q in questions]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
        last = inputs["attention_mask"].sum(dim=1) - 1
        hidden = model(input_ids=inputs["input_ids"]).last_hidden_state[torch.arange(rows), last]
        letters = torch.tensor(tokenizer.convert_tokens_to_ids([q.answer for q in questions]))
        loss = F.cross_entropy(head(hidden), letters)
        descent.step(loss, loss=loss)
