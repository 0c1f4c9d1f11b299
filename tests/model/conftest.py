"""The random tiny Janus as a checkpoint in the original layout."""

import pytest

from fastcorl.model import original_config
from tests.helpers import make_janus
from tests.model.original_layout import TINY_TOWERS, TINY_VQ_MODELS, original_state, write_original


@pytest.fixture
def tiny_parts(monkeypatch):
    """Names for its vision tower and VQ model, which a configuration of the original layout gives by name."""
    monkeypatch.setattr(original_config, "VISION_TOWERS", original_config.VISION_TOWERS | TINY_TOWERS)
    monkeypatch.setattr(original_config, "VQ_MODELS", original_config.VQ_MODELS | TINY_VQ_MODELS)


@pytest.fixture(scope="session")
def original_tensors():
    return original_state(make_janus())


@pytest.fixture
def original(original_tensors, tiny_parts, tmp_path):
    write_original(tmp_path / "original", original_tensors)
    return tmp_path / "original"
