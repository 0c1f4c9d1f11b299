"""Objects named by a user as `module:name`: data sets, rewards, scorers."""

import importlib
import os
import re
import sys
from typing import Any

from fastcorl.errors import UserError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_spec(text: str) -> bool:
    """Whether `text` has the form `module:name`."""
    return _SPEC.fullmatch(text) is not None


def load_object(spec: str, key: str) -> Any:
    """Import what `spec` names; `key` is the configuration key that errors point to.

    Modules in the current folder are found too, after everything installed.
    """
    if not is_spec(spec):
        raise UserError(f"{key}: {spec!r} is not of the form module:name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module_name, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UserError(f"{key}: {spec}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}: {spec}: {module_name!r} has no {name!r}")
        found = getattr(found, part)
    return found
