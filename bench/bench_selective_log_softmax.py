"""Log-probabilities of chosen tokens from logits: forward alone, as for the old policy's, and with the gradient."""

from functools import lru_cache

import pytest

from bench.floors import copy
from bench.measure import measure
from bench.peers import liger, ours, plain, trl
from bench.peers.contestant import Contestant
from bench.problems import logits_problem
from bench.shapes import LOGITS, parametrize

PROVIDERS = {
    "fastcorl": ours.selective_log_softmax,
    "torch": plain.log_softmax,
    "torch.compile": plain.compiled(plain.log_softmax),
    "TRL": trl.log_softmax,
}
FORWARD_PROVIDERS = {**PROVIDERS, "Liger": liger.log_softmax}
SHAPES = parametrize({name: shape for name, shape in LOGITS.items() if shape.kept == 1.0})


@lru_cache(maxsize=1)
def prepare(name):
    problem = logits_problem(LOGITS[name])
    expected = plain.exact(plain.log_softmax, problem).forward_and_backward(problem.rows.upstream.double())
    return problem, expected


@pytest.mark.parametrize("provider", FORWARD_PROVIDERS)
@SHAPES
def bench_forward(benchmark, shape, provider):
    problem, (log_probs, _) = prepare(shape)
    measure(
        benchmark,
        provider,
        FORWARD_PROVIDERS,
        problem,
        op="selective_log_softmax, forward",
        shape=shape,
        expected=(log_probs,),
        floor=copy(problem.logits.nbytes, problem.logits.device),
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
        op="selective_log_softmax",
        shape=shape,
        expected=expected,
        # The forward reads the logits; the backward, whose upstream gradient is unknown before, reads and writes them.
        floor=copy(3 * problem.logits.nbytes, problem.logits.device),
        run=lambda contestant: contestant.forward_and_backward(problem.rows.upstream),
    )
