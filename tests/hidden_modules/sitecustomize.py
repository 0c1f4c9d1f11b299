"""Python runs this at its start where the folder is on PYTHONPATH: modules look as if they were not installed.

HIDDEN_MODULES are the names of those; with ONLY_MODULES, all but these and the standard library are hidden.
FOUND_MODULES is a file: a process that runs train.py appends at its end where it finds some modules.
"""

import atexit
import importlib.util
import json
import os
import sys

HIDDEN = set(os.environ.get("HIDDEN_MODULES", "").split())
ONLY = set(os.environ.get("ONLY_MODULES", "").split())
FOUND = os.environ.get("FOUND_MODULES")
LOOKED_FOR = ("datasets", "fastcorl", "fastcorl_kernels", "kernels", "transformers", "types")


def hidden(name: str) -> bool:
    top = name.partition(".")[0]
    return top in HIDDEN or bool(ONLY) and top not in ONLY and top not in sys.stdlib_module_names


class Hiding:
    """A finder of modules and of their metadata that does not find the hidden ones."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if hidden(name) else self._finder.find_spec(name, path, target)

    def find_distributions(self, context):
        if context.name is not None and hidden(context.name.replace("-", "_")):
            return []
        find = getattr(self._finder, "find_distributions", None)
        return [] if find is None else find(context)


def tell_found() -> None:
    if not sys.argv[0].endswith("train.py"):
        return
    specs = {name: importlib.util.find_spec(name) for name in LOOKED_FOR}
    with open(FOUND, "a") as file:
        file.write(json.dumps({name: spec and spec.origin for name, spec in specs.items()}) + "\n")


if HIDDEN or ONLY:
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
if FOUND:
    atexit.register(tell_found)
