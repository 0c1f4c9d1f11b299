from functools import cache

import pytest

from fastcorl.rollout import RolloutEngine, SamplingParams


@pytest.fixture(scope="session")
def rollout_of(policy, prompts):
    """A rollout of all prompts in groups of two, made once per guidance and temperature. Not to be written to."""

    @cache
    def generate(guidance=5.0, temperature=1.0):
        return RolloutEngine(policy).generate(prompts, 2, SamplingParams(temperature, guidance, 24), seed="rollout")

    return generate
