"""Objects named by a user as `module:name`: data sets, rewards, scorers; and packages that a setting needs."""

import importlib
import os
import re
import sys
from importlib.util import find_spec
from typing import Any

from fastcorl.errors import UserError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_SHOWN = 8


def is_spec(text: str) -> bool:
    """Whether `text` has the form `module:name`."""
    return _SPEC.fullmatch(text) is not None


def check_module(spec: str, key: str) -> None:
    """Raise UserError where `spec` is not `module:name`, or there is no such module. Nothing is imported."""
    if not is_spec(spec):
        raise UserError(f"{key}: {spec!r} is not of the form module:name")
    _search_current_folder()
    module = spec.partition(":")[0]
    top = module.partition(".")[0]
    if top not in sys.modules and find_spec(top) is None:
        raise UserError(f"{key}: {spec}: cannot import {module!r}: {_no_module(top)}")


def load_object(spec: str, key: str) -> Any:
    """Import what `spec` names; `key` is the configuration key that errors point to.

    Modules in the current folder are found too, after everything installed.
    """
    check_module(spec, key)
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            reason = _no_module(error.name)
        raise UserError(f"{key}: {spec}: cannot import {module_name!r}: {reason}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            others = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
            listed = f"; it has {', '.join(others[:_SHOWN])}{', ..' if len(others) > _SHOWN else ''}" if others else ""
            raise UserError(f"{key}: {spec}: {module_name!r} has no {name!r}{listed}")
        found = getattr(found, part)
    return found


def check_package(name: str, key: str, otherwise: str) -> None:
    """Raise UserError, naming `key` and what to do `otherwise`, where a package is not installed."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of this name, such as W&B leaves, is no package
        raise UserError(f"{key}: {name} is not installed (pip install {name}); {otherwise}")


def _search_current_folder() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _no_module(name: str) -> str:
    return f"ModuleNotFoundError: No module named {name!r}; install it, or start in the folder that it is in"
