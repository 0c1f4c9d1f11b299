"""The random tiny policy, built once; folders that need another kind of `policy` or `prompts` override these."""

import pytest


@pytest.fixture(scope="session")
def policy():
    from tests.helpers import make_policy

    return make_policy()


@pytest.fixture(scope="session")
def reference():
    """The policy's weights in transformers' own model, with its eager attention."""
    from tests.helpers import make_reference

    return make_reference()


@pytest.fixture(scope="session")
def prompts():
    from tests.helpers import make_prompts

    return make_prompts()
