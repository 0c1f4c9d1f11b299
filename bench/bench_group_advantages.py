"""Group-relative advantages: too small for bandwidth or arithmetic to matter, so the floor is one small copy."""

import pytest

from bench.floors import copy
from bench.measure import measure
from bench.peers import ours, plain
from bench.peers.contestant import Contestant
from bench.problems import reward_problem
from bench.shapes import REWARDS, parametrize

PROVIDERS = {
    "fastcorl": ours.group_advantages,
    "torch": plain.group_advantages,
    "torch.compile": plain.compiled(plain.group_advantages),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@parametrize(REWARDS)
def bench_forward(benchmark, shape, provider):
    problem = reward_problem(REWARDS[shape])
    measure(
        benchmark,
        provider,
        PROVIDERS,
        problem,
        op="group_advantages",
        shape=shape,
        expected=plain.exact(plain.group_advantages, problem).forward(),
        floor=copy(problem.rewards.nbytes + problem.rewards[:, 0].nbytes, problem.rewards.device),
        run=Contestant.forward,
    )
