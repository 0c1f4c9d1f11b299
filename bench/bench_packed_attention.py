"""Attention in packs with shared prompts, forward and backward, at the sizes of training Janus-Pro-1B.

The ways of `fastcorl.model` against one another, and against the same sequences with a prompt before each of them.
"""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from bench.floors import Floor
from bench.measure import measure
from bench.peers.contestant import Contestant
from bench.shapes import OnDevice, parametrize
from fastcorl.model.backends import SHARED, packed_backend
from fastcorl.model.buckets import by_buckets
from fastcorl.model.pack_layout import PackLayout


@dataclass(frozen=True)
class PackShape(OnDevice):
    """``groups`` prompts of ``prompt`` tokens, each continued by ``group`` sequences of ``shortest`` to ``longest``."""

    groups: int
    prompt: int
    shortest: int
    longest: int
    group: int = 8
    heads: int = 16
    head_dim: int = 128
    device: str = "cuda"


# Packs of about packing.tokens = 16384 positions.
PACKS = {
    "small": PackShape(2, prompt=60, shortest=8, longest=40, heads=4, head_dim=32, device="cpu"),
    "Janus-Pro-1B, 8 answers per prompt of 620": PackShape(5, prompt=620, shortest=64, longest=512),
    "Janus-Pro-1B, 8 drawings per caption of 60": PackShape(3, prompt=60, shortest=575, longest=575),
}


@dataclass(frozen=True)
class PackProblem:
    leaves: tuple  # query, key, value: (N, H, D)
    upstream: torch.Tensor
    layout: PackLayout
    unshared: PackLayout
    sources: torch.Tensor  # (M,) position in the pack of each one in the unshared pack
    pairs: int  # of a query and a key that it sees

    @property
    def firsts(self):
        """(N,) the first place in the unshared pack of each position."""
        places = torch.full_like(self.upstream[:, 0, 0], len(self.sources), dtype=torch.int64)
        return places.scatter_reduce(0, self.sources, torch.arange(len(self.sources)).to(places), "amin")


@dataclass(frozen=True)
class PackContestant(Contestant):
    upstream: torch.Tensor | None = None

    def run(self):
        return self.forward_and_backward(self.upstream)


@lru_cache(maxsize=1)
def prepare(name):
    """The problem, and its output and gradients in float64."""
    problem = pack_problem(PACKS[name])
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in problem.leaves)
    exact = PackContestant(attention(by_buckets, problem.layout), leaves, upstream=problem.upstream.double())
    return problem, exact.run()


def pack_problem(shape):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(shape.shortest, shape.longest + 1, (shape.groups, shape.group), generator=generator).tolist()
    lengths, prefixes, whole, sources, pairs = [], [], [], [], 0
    for members in sizes:
        start, parent = sum(lengths), len(lengths)
        prompt = torch.arange(start, start + shape.prompt)
        lengths += [shape.prompt, *members]
        prefixes += [-1] + [parent] * len(members)
        pairs += shape.prompt * (shape.prompt + 1) // 2
        start += shape.prompt
        for length in members:
            whole.append(shape.prompt + length)
            sources += [prompt, torch.arange(start, start + length)]
            pairs += length * shape.prompt + length * (length + 1) // 2
            start += length

    def bounds(lengths):
        return torch.tensor([0, *lengths], device=shape.device).cumsum(0)

    size = (sum(lengths), shape.heads, shape.head_dim)
    *leaves, upstream = (torch.randn(size, generator=generator).to(shape.device, shape.dtype) for _ in range(4))
    return PackProblem(
        leaves=tuple(leaf.requires_grad_() for leaf in leaves),
        upstream=upstream,
        layout=PackLayout(bounds(lengths), torch.tensor(prefixes)),
        unshared=PackLayout(bounds(whole)),
        sources=torch.cat(sources).to(shape.device),
        pairs=pairs,
    )


def attention(attend, layout):
    return lambda *leaves: attend(*leaves, layout, leaves[0].shape[-1] ** -0.5)


def backend_of(problem):
    query = problem.leaves[0]
    return packed_backend("auto", query.dtype, query.shape[-1], query.device)


def shared(problem, attend):
    return PackContestant(attention(attend, problem.layout), problem.leaves, upstream=problem.upstream)


def unshared(problem):
    """The prompt's own gradient counts in its first copy, and the gradients of its copies are added."""
    firsts = problem.firsts
    upstream = torch.zeros_like(problem.upstream[problem.sources])
    upstream[firsts] = problem.upstream

    def read(results):
        output, *gradients = results
        yield output[firsts]
        for gradient in gradients:
            total = gradient.new_zeros(problem.upstream.shape, dtype=torch.float32)
            yield total.index_add_(0, problem.sources, gradient.float())

    leaves = tuple(leaf.detach()[problem.sources].requires_grad_() for leaf in problem.leaves)
    attend = attention(backend_of(problem).own, problem.unshared)
    return PackContestant(attend, leaves, read=lambda results: tuple(read(results)), upstream=upstream)


def way(name):
    def contestant(problem):
        try:
            return shared(problem, SHARED[name]())
        except ImportError as error:
            pytest.skip(str(error))

    return contestant


UNSHARED = "a prompt before each"
PROVIDERS = {
    "fastcorl": lambda problem: shared(problem, backend_of(problem).shared),
    "two parts, torch": way("torch"),
    "two parts, flash_attn": way("flash_attn"),
    "flex": way("flex"),
    "padded buckets": way("sdpa"),
    UNSHARED: unshared,
}
ON_A_CPU = ("fastcorl", "padded buckets", UNSHARED)


def products(problem):
    """A square product of as many operations as the two products of forward and the four of backward have."""
    query = problem.leaves[0]
    operations = 6 * 2 * problem.pairs * query.shape[1] * query.shape[2]
    side = round((operations / 2) ** (1 / 3))
    left, right, out = (torch.randn(side, side, dtype=query.dtype, device=query.device) for _ in range(3))
    return Floor(lambda: torch.mm(left, right, out=out), 2 * side**3, "FLOP")


@pytest.mark.parametrize("provider", PROVIDERS)
@parametrize(PACKS)
def bench_packed_attention(benchmark, shape, provider):
    if PACKS[shape].device == "cpu" and provider not in ON_A_CPU:
        pytest.skip("runs on a GPU only")
    problem, expected = prepare(shape)
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="packed_attention",
        shape=shape,
        expected=expected,
        floor=products(problem),
        run=PackContestant.run,
    )
