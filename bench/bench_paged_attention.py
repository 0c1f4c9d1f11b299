"""Decoding over paged keys and values, at the sizes of a rollout of Janus-Pro-1B.

The peer is torch's attention on keys and values that lie in order, gathered outside of the measured time: a bound on
what any gathering could reach, not a way to decode.
"""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

import fastcorl_kernels
from bench.floors import copy
from bench.measure import measure
from bench.peers.contestant import Contestant
from bench.shapes import OnDevice, parametrize

PAGE = 16


@dataclass(frozen=True)
class DecodeShape(OnDevice):
    """Rows of ``context`` tokens, of which neighbours in groups of ``group`` share the first ``prefix``."""

    rows: int
    context: int
    prefix: int = 0
    group: int = 1
    longest: int = 1024  # tokens that the table has room for
    heads: int = 16
    head_dim: int = 128
    device: str = "cuda"


DECODING = {
    "Janus-Pro-1B, 256 image rows": DecodeShape(256, 320, longest=608),
    "Janus-Pro-1B, 128 text rows in groups of 8": DecodeShape(128, 768, prefix=640, group=8),
}


@dataclass(frozen=True)
class DecodeProblem:
    query: torch.Tensor  # (R, H, D)
    key_pages: torch.Tensor  # (pages, PAGE, H, D)
    value_pages: torch.Tensor
    block_table: torch.Tensor  # (R, P)
    context_lengths: torch.Tensor  # (R,)
    prefix: fastcorl_kernels.SharedPrefix | None
    kv_bytes: int  # of distinct tokens, which have to be read once

    @property
    def leaves(self):
        return self.query, self.key_pages, self.value_pages

    def in_order(self, pages):
        """(R, H, context, D), contiguous."""
        length = int(self.context_lengths[0])
        table = self.block_table[:, : length // PAGE].long()
        return pages[table].flatten(1, 2).transpose(1, 2).contiguous()


@lru_cache(maxsize=1)
def prepare(name):
    """The problem, and its result in float64."""
    problem = decode_problem(DECODING[name])
    exact = sdpa(problem)
    return problem, (exact.function(*(leaf.double() for leaf in exact.leaves)),)


def decode_problem(shape):
    generator = torch.Generator(shape.device).manual_seed(0)
    groups, shared, own = shape.rows // shape.group, shape.prefix // PAGE, (shape.context - shape.prefix) // PAGE
    count = groups * shared + shape.rows * own
    ids = torch.randperm(count, generator=generator, device=shape.device).int()
    table = torch.zeros(shape.rows, shape.longest // PAGE, dtype=torch.int32, device=shape.device)
    table[:, :shared] = ids[: groups * shared].view(groups, shared).repeat_interleave(shape.group, 0)
    table[:, shared : shared + own] = ids[groups * shared :].view(shape.rows, own)

    def normal(*size):
        return torch.randn(size, dtype=shape.dtype, generator=generator, device=shape.device)

    prefix = None
    if shape.prefix:
        bounds = torch.arange(0, shape.rows + 1, shape.group, dtype=torch.int32, device=shape.device)
        lengths = torch.full_like(bounds[1:], shape.prefix)
        prefix = fastcorl_kernels.SharedPrefix(bounds, lengths, shape.group)
    keys, values = (normal(count, PAGE, shape.heads, shape.head_dim) for _ in range(2))
    return DecodeProblem(
        query=normal(shape.rows, shape.heads, shape.head_dim),
        key_pages=keys,
        value_pages=values,
        block_table=table,
        context_lengths=torch.full_like(table[:, 0], shape.context),
        prefix=prefix,
        kv_bytes=keys.nbytes + values.nbytes,
    )


def ours(problem, prefix):
    def attention(*leaves):
        return fastcorl_kernels.paged_decode_attention(
            *leaves, problem.block_table, problem.context_lengths, prefix=prefix
        )

    return Contestant(attention, problem.leaves)


def sdpa(problem):
    def attention(query, keys, values):
        return torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values)[:, :, 0]

    pages = (problem.key_pages, problem.value_pages)
    return Contestant(attention, (problem.query, *map(problem.in_order, pages)))


UNSHARED = "fastcorl, prefix not shared"
PROVIDERS = {
    "fastcorl": lambda problem: ours(problem, problem.prefix),
    UNSHARED: lambda problem: ours(problem, None),
    "torch SDPA, gathered before": sdpa,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@parametrize(DECODING)
def bench_decoding(benchmark, shape, provider):
    problem, expected = prepare(shape)
    if provider == UNSHARED and problem.prefix is None:
        pytest.skip("the rows share nothing")
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="paged_decode_attention",
        shape=shape,
        expected=expected,
        floor=copy(problem.kv_bytes, problem.query.device),
        run=Contestant.forward,
    )
