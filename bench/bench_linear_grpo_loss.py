"""GRPO loss and its gradients, from hidden states."""

from functools import lru_cache

import pytest

from bench.floors import matmuls
from bench.goals import OURS
from bench.measure import measure
from bench.peers import liger, ours, plain, trl
from bench.peers.contestant import Contestant
from bench.problems import linear_problem
from bench.shapes import HEADS, TALL, parametrize

PROVIDERS = {
    "fastcorl": ours.linear_grpo_loss,
    "torch": plain.grpo,
    "torch.compile": plain.compiled(plain.grpo),
    "TRL, chunked": trl.chunked_grpo,
    "Liger, chunked": liger.chunked_grpo,
    "Liger, matmul and loss": liger.matmul_and_grpo,
    "Liger, scaled cross-entropy": liger.scaled_cross_entropy_grpo,
}


@lru_cache(maxsize=1)
def prepare(name):
    problem = linear_problem(HEADS[name])
    return problem, plain.exact(plain.grpo, problem).forward_and_backward()


@pytest.mark.parametrize("provider", PROVIDERS)
@parametrize(HEADS)
def bench_forward_and_backward(benchmark, shape, provider):
    if shape == TALL and provider != OURS:
        pytest.skip("of this shape only our own memory is looked at")
    problem, expected = prepare(shape)
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="linear_grpo_loss",
        shape=shape,
        expected=expected,
        floor=matmuls(HEADS[shape], problem.rows.kept),
        run=Contestant.forward_and_backward,
    )
