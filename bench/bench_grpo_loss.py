"""GRPO loss and its gradient, from logits."""

from functools import lru_cache

import pytest

from bench.floors import copy
from bench.measure import measure
from bench.peers import liger, ours, plain, trl
from bench.peers.contestant import Contestant
from bench.problems import logits_problem
from bench.shapes import LOGITS, parametrize

PROVIDERS = {
    "fastcorl": ours.grpo_loss,
    "torch": plain.grpo,
    "torch.compile": plain.compiled(plain.grpo),
    "TRL": trl.grpo,
    "Liger": liger.grpo,
    "Liger, in place": liger.grpo_in_place,
}


@lru_cache(maxsize=1)
def prepare(name):
    problem = logits_problem(LOGITS[name])
    return problem, plain.exact(plain.grpo, problem).forward_and_backward()


@pytest.mark.parametrize("provider", PROVIDERS)
@parametrize(LOGITS)
def bench_forward_and_backward(benchmark, shape, provider):
    problem, expected = prepare(shape)
    kept_bytes = problem.logits.nbytes * problem.rows.kept // problem.rows.token_ids.shape[0]
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="grpo_loss",
        shape=shape,
        expected=expected,
        # The rows that count are read, and the gradient of every row is written.
        floor=copy(kept_bytes + problem.logits.nbytes, problem.logits.device),
        run=Contestant.forward_and_backward,
    )
