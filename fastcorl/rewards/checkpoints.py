"""Checkpoints of the networks that judge: read as they are published, whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from fastcorl.errors import UserError
from fastcorl.model.loading import quiet_transformers
from fastcorl.places import model_folder


@contextmanager
def loading(key: str, path: str | Path) -> Iterator[str]:
    """What `from_pretrained` is to be given for `path`, a folder or hub name; an error of its is a UserError of `key`.

    Transformers' report of weights that a model has no use for is not shown.
    """
    folder = model_folder(str(path), key)
    try:
        with quiet_transformers():
            yield str(folder or path)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        AttributeError,
        ImportError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: cannot load {str(path)!r}, as a folder or from the hub: {reason}") from error


def check_model_type(name: str, model_type: str) -> None:
    """Raises ValueError where the checkpoint `name` holds another kind of model."""
    found = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if found != model_type:
        raise ValueError(f"it is a {found!r} model; expected {model_type!r}")


def load_model(model_class: type, name: str, *, optional: tuple[str, ...] = (), **settings: object) -> nn.Module:
    """`model_class.from_pretrained(name)` in float32. Raises ValueError where weights are missing, which transformers
    would draw at random, except those whose names begin with one of `optional`."""
    model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **settings)
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(optional))
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights, the first is {missing[0]}")
    return model.eval().requires_grad_(False)
