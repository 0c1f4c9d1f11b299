"""Log-probabilities of chosen tokens from hidden states: forward alone, as for the old policy's, and with gradients."""

from functools import lru_cache

import pytest

from bench.floors import matmuls
from bench.measure import measure
from bench.peers import liger, ours, plain, trl
from bench.peers.contestant import Contestant
from bench.problems import linear_problem
from bench.shapes import HEADS, TALL, parametrize

PROVIDERS = {
    "fastcorl": ours.linear_selective_log_softmax,
    "torch": plain.log_softmax,
    "torch.compile": plain.compiled(plain.log_softmax),
    "TRL, chunked": trl.chunked_log_softmax,
    "Liger, scaled cross-entropy": liger.scaled_cross_entropy,
}
SHAPES = parametrize({name: shape for name, shape in HEADS.items() if shape.kept == 1.0 and name != TALL})


@lru_cache(maxsize=1)
def prepare(name):
    problem = linear_problem(HEADS[name])
    expected = plain.exact(plain.log_softmax, problem).forward_and_backward(problem.rows.upstream.double())
    return problem, expected


@pytest.mark.parametrize("provider", PROVIDERS)
@SHAPES
def bench_forward(benchmark, shape, provider):
    problem, (log_probs, *_) = prepare(shape)
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="linear_selective_log_softmax, forward",
        shape=shape,
        expected=(log_probs,),
        floor=matmuls(HEADS[shape], problem.rows.kept, forward_only=True),
        run=Contestant.forward,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@SHAPES
def bench_forward_and_backward(benchmark, shape, provider):
    problem, expected = prepare(shape)
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="linear_selective_log_softmax",
        shape=shape,
        expected=expected,
        floor=matmuls(HEADS[shape], problem.rows.kept),
        run=lambda contestant: contestant.forward_and_backward(problem.rows.upstream),
    )
