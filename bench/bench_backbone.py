"""Forward and backward of a backbone on a pack: transformers' modules, what a run takes by default, blocks compiled."""

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from bench.floors import Floor
from bench.measure import measure
from bench.peers.contestant import Contestant
from bench.shapes import OnDevice, parametrize
from fastcorl.model import PackedAttention
from fastcorl.model.attention import IMPLEMENTATION
from fastcorl.model.fused_layers import compile_blocks
from fastcorl.model.loading import speed_up


@dataclass(frozen=True)
class BackboneShape(OnDevice):
    """A Llama of `layers` blocks on `sequences` equally long sequences."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    sequences: int
    length: int
    device: str = "cpu"

    @property
    def positions(self):
        return self.sequences * self.length


BACKBONES = {
    "4 layers, 192 wide, 512 tokens": BackboneShape(4, 192, 512, 3, 8, 64),
    "4 layers of Janus-Pro-1B, 8192 tokens": BackboneShape(4, 2048, 5632, 16, 8, 1024, device="cuda"),
}


@dataclass(frozen=True)
class BackboneProblem:
    backbone: torch.nn.Module
    embeds: torch.Tensor  # (1, N, hidden), wants a gradient
    weights: torch.Tensor  # (1, N, hidden); the loss is the sum of their products with the hidden states
    cu_seqlens: torch.Tensor
    positions: torch.Tensor  # (1, N)

    @property
    def leaves(self):
        return (self.embeds,)


@lru_cache(maxsize=1)
def prepare(name):
    """The problem, and its loss and gradients in float64."""
    problem = backbone_problem(BACKBONES[name])
    exact = BackboneProblem(
        deepcopy(problem.backbone).double(),
        problem.embeds.detach().double().requires_grad_(),
        problem.weights.double(),
        problem.cu_seqlens,
        problem.positions,
    )
    return problem, transformers_modules(exact).forward_and_backward()


def backbone_problem(shape):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
    )
    with torch.device(shape.device):
        backbone = LlamaModel(config).to(shape.dtype).eval()
        embeds = torch.randn(1, shape.positions, shape.hidden, dtype=shape.dtype, requires_grad=True)
        return BackboneProblem(
            backbone,
            embeds,
            torch.randn_like(embeds),
            torch.arange(0, shape.positions + 1, shape.length, dtype=torch.int32),
            torch.arange(shape.length).repeat(shape.sequences)[None],
        )


def contestant(problem, change=None):
    """`change` makes the backbone faster, in place. The blocks' weights get gradients, too; the input's is read."""
    backbone = problem.backbone
    backbone.set_attn_implementation(IMPLEMENTATION)
    if change is not None:
        backbone = deepcopy(backbone)
        change(backbone)
    weights = list(backbone.layers.parameters())

    def loss(embeds, *_):
        attention = PackedAttention(problem.cu_seqlens)
        hidden = backbone(
            inputs_embeds=embeds, position_ids=problem.positions, use_cache=False, attention=attention
        ).last_hidden_state
        return (hidden * problem.weights).mean(dtype=torch.float32).double()

    return Contestant(loss, (*problem.leaves, *weights), read=lambda outputs: outputs[:2])


def transformers_modules(problem):
    return contestant(problem)


def fastcorl(problem):
    """As `model.liger: auto` has it."""
    return contestant(problem, lambda backbone: speed_up(backbone, "auto"))


def compiled(problem):
    return contestant(problem, compile_blocks)


PROVIDERS = {"fastcorl": fastcorl, "transformers' modules": transformers_modules, "torch.compile": compiled}


def products(shape):
    """The matrix products of the linear layers, forward and backward."""
    options = dict(dtype=shape.dtype, device=shape.device)
    sizes = [(shape.hidden, shape.hidden)] * 4 + [(shape.hidden, shape.intermediate)] * 3
    states = {width: torch.randn(shape.positions, width, **options) for width in (shape.hidden, shape.intermediate)}
    weights = {size: torch.randn(size, **options) for size in set(sizes)}

    def run():
        for _ in range(shape.layers):
            for inner, outer in sizes:
                torch.mm(states[inner], weights[inner, outer])
                torch.mm(states[outer], weights[inner, outer].T)
                torch.mm(states[inner].T, states[outer])

    return Floor(run, 6 * shape.layers * shape.positions * sum(inner * outer for inner, outer in sizes), "FLOP")


@pytest.mark.parametrize("provider", PROVIDERS)
@parametrize(BACKBONES)
def bench_forward_and_backward(benchmark, shape, provider):
    problem, expected = prepare(shape)
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="backbone",
        shape=shape,
        expected=expected[:2],
        floor=products(BACKBONES[shape]),
        run=Contestant.forward_and_backward,
    )
