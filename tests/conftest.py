"""The random tiny policy, built once; folders that need another kind of `policy` or `prompts` override these."""

import os

import pytest
import torch

# Before anything imports Triton, whose own functions are interpreted or compiled from then on.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Whole runs first, lest one of several processes is left with a long one in the end."""
    items.sort(key=lambda item: not {"loop", "faults", "test_docs_pages.py"} & set(item.path.parts))


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
