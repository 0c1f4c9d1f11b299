"""Floating-point operations of a step, from the sizes of the model and of what was sampled.

Only useful work counts, so that the figure is one of the step and not of how it was run: a group's prompt once,
whatever packs repeat it; keys that causality lets a position see; heads on rows with loss; nothing that checkpointing,
a padded batch or a kernel's backward does again. Gradients of weights count where weights are trained, gradients of
activations where something trained lies before them. Only matrix products and attention count, a multiply-add as two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastcorl.records import Rollout


@dataclass(frozen=True)
class Products:
    """Multiply-adds of matrix products per row that goes in: `forward`, and `backward` for both kinds of gradients."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Products") -> "Products":
        return Products(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Work:
    """What the arithmetic of sequences depends on. `tokens` are positions that run through the backbone, `keys` the
    positions that each of them attends to, itself included, summed up. Rows of the heads: `neck_rows` go through the
    image head's first layers, `image_rows` through its last one."""

    tokens: int = 0
    keys: int = 0
    neck_rows: int = 0
    image_rows: int = 0
    text_rows: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))


def drawings(prompt: int, count: int, codes: int, *, guided: bool = False, sampled: bool = False) -> Work:
    """One group: `count` drawings of `codes` image codes each after a prompt of `prompt` tokens.

    Args:
        guided: every drawing has an unconditional twin. In training its prompt counts once per group, and the twin
            needs the image head's last layer no more (guidance is applied before it).
        sampled: the group is sampled, which takes the logits of both twins; the unconditional prompts of all groups are
            one chain then, run once, and do not count.
    """
    twins = 2 if guided else 1
    work = _group(prompt, [codes] * count)
    if guided:
        work += _group(prompt, [codes] * count, with_prompt=not sampled)
    return work + Work(neck_rows=twins * count * codes, image_rows=(twins if sampled else 1) * count * codes)


def answers(prompt: int, lengths: Sequence[int]) -> Work:
    """One group: answers of these lengths in tokens after a prompt of `prompt` tokens, image features included."""
    return _group(prompt, lengths) + Work(text_rows=sum(lengths))


def _group(prompt: int, completions: Sequence[int], *, with_prompt: bool = True) -> Work:
    inputs = [length - 1 for length in completions if length]  # the last token predicts nothing
    if not inputs:
        return Work()
    tokens = prompt * with_prompt + sum(inputs)
    keys = prompt * (prompt + 1) // 2 * with_prompt + sum(n * prompt + n * (n + 1) // 2 for n in inputs)
    return Work(tokens, keys)


def rollout_work(rollout: Rollout, *, guided: bool, sampled: bool = False) -> Work:
    """The work of training on a rollout once, or of sampling it (without the rows that come from the data).

    `guided` is that of the policy in training, of the sampling otherwise. Each group's prompt counts once per modality.
    """
    kept = rollout.group_size - (rollout.num_external if sampled else 0)
    total = Work()
    if rollout.images is not None:
        codes = rollout.images.tokens.shape[1]
        for ids in rollout.draw_ids:
            total += drawings(len(ids), kept, codes, guided=guided, sampled=sampled)
    if rollout.texts is not None:
        lengths = rollout.texts.lengths.tolist()
        for index, ids in enumerate(rollout.ask_ids):
            first = index * rollout.group_size
            total += answers(len(ids), lengths[first : first + kept])
    return total


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a unified model, as far as its arithmetic goes. `attention` is per attended key, the two heads and the
    backbone per row; `vision` are the operations of the tower and its aligner per image, `decoding` those of the VQ
    decoder per drawing, both forward only, since they are frozen."""

    backbone: Products
    attention: Products
    neck: Products
    image_head: Products
    text_head: Products
    vision: int
    decoding: int

    @classmethod
    def of(cls, policy: Any) -> "ModelShape":
        """Read a policy's sizes; nothing is computed with its weights, which may be shards or on the meta device."""
        trained = {id(weight) for _, weight in policy.trained_parameters()}
        backbone, attention = _blocks(policy.backbone, trained)
        generation_head = policy.janus.model.generation_head
        vision, decoding = _frozen_parts(policy)
        return cls(
            backbone=backbone,
            attention=attention,
            neck=_product(generation_head.proj_out, trained, reached=True),
            image_head=_product(policy.image_head, trained, reached=True),
            text_head=_product(policy.text_head, trained, reached=True),
            vision=vision,
            decoding=decoding,
        )

    def forward(self, work: Work) -> int:
        """Operations of running `work` without gradients: sampling it, or scoring it."""
        return 2 * sum(products.forward * count for products, count in self._parts(work))

    def train(self, work: Work) -> int:
        """Operations of forward and backward of `work`."""
        return self.forward(work) + 2 * sum(products.backward * count for products, count in self._parts(work))

    def _parts(self, work: Work) -> Iterable[tuple[Products, int]]:
        yield self.backbone, work.tokens
        yield self.attention, work.keys
        yield self.neck, work.neck_rows
        yield self.image_head, work.image_rows
        yield self.text_head, work.text_rows


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step by what they are for. Reward models do not count."""

    rollout: int
    vision: int
    decoding: int
    scoring: int
    train: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def step_flops(
    shape: ModelShape, sampled: Work, trained: Work, *, images: int, drawn: int, scorings: int = 0, updates: int = 1
) -> StepFlops:
    """Operations of a step.

    Args:
        sampled, trained: from `rollout_work`; what was sampled and thrown away is not useful.
        images: real images whose features were computed; drawn: drawings that were decoded to pixels.
        scorings: passes over `trained` without gradients, for reference or old log-probs.
        updates: passes over `trained` with gradients.
    """
    return StepFlops(
        rollout=shape.forward(sampled),
        vision=images * shape.vision,
        decoding=drawn * shape.decoding,
        scoring=scorings * shape.forward(trained),
        train=updates * shape.train(trained),
    )


def _blocks(backbone: nn.Module, trained: set[int]) -> tuple[Products, Products]:
    """All blocks of a Llama, per position and per attended key. In the first block of a model with adapters nothing
    trained lies before the first products, whose inputs then need no gradient."""
    reached = id(backbone.embed_tokens.weight) in trained
    width = backbone.config.num_attention_heads * backbone.layers[0].self_attn.head_dim
    total, attention = Products(), Products()
    for block in backbone.layers:
        attends, mlp = block.self_attn, block.mlp
        projections = (attends.q_proj, attends.k_proj, attends.v_proj)
        query, key, value = (reached or _is_trained(linear, trained) for linear in projections)
        # Queries with keys, weights with values; gradients of queries, of keys, of weights for these, of values.
        attention += Products(2 * width, width * (query + key + (query or key) + value))
        for side_by_side in (projections, (attends.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
            for linear in side_by_side:
                total += _product(linear, trained, reached=reached)
            reached = reached or any(_is_trained(linear, trained) for linear in side_by_side)
    return total, attention


def _is_trained(linear: nn.Module, trained: set[int]) -> bool:
    return any(id(weight) in trained for weight in linear.parameters())


def _product(linear: nn.Module, trained: set[int], *, reached: bool) -> Products:
    """A linear layer and its adapter, if it has one. `reached`: the gradient of its input is needed."""
    total = Products()
    for name, one in linear.named_modules():
        if isinstance(one, nn.Linear) and (name == "" or name.startswith(("base_layer", "lora_A", "lora_B"))):
            size = one.in_features * one.out_features
            needed = reached or name.startswith("lora_B")  # what comes in there was made by the trained lora_A
            total += Products(size, size * ((id(one.weight) in trained) + needed))
    return total


def _frozen_parts(policy: Any) -> tuple[int, int]:
    """Operations of the vision tower per image and of the VQ decoder per drawing, counted on one run without memory."""
    with torch.device("meta"), torch.no_grad():
        janus = type(policy.janus)._from_config(policy.janus.config)
        vision = janus.config.vision_config
        pixels = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size, dtype=janus.dtype)
        codes = torch.empty(1, policy.num_image_tokens, dtype=torch.int64)
        return (
            _counted(lambda: janus.model.get_image_features(pixels, return_dict=True)),
            _counted(lambda: janus.decode_image_tokens(codes)),
        )


def _counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
