"""Files and folders that Python takes for a module of its own, or of a package, because of their names.

The current folder (with `python -m`, and in the deepspeed launcher) and those of PYTHONPATH come before the standard
library and everything installed.
"""

import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from fastcorl.system_checks.findings import Finding

NAME = "module names"
KERNELS = "kernels"
# In the standard library, but nobody imports them: a user's folder `test` does no harm.
UNUSED = {"antigravity", "idlelib", "test", "this", "turtle", "turtledemo"}
PACKAGES = {
    "PIL",
    "accelerate",
    "datasets",
    "deepspeed",
    "flash_attn",
    "huggingface_hub",
    "liger_kernel",
    "matplotlib",
    "numpy",
    "packaging",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "torch",
    "torchmetrics",
    "trackio",
    "transformers",
    "triton",
    "tyro",
    "wandb",
    "xformers",
    "yaml",
}


def check_module_names() -> list[Finding]:
    """A problem for each shadow; one line if there is none."""
    found = [
        Finding(NAME, "problem", f"{path} {reason}", f"rename {path.name}, or run from elsewhere", needed=True)
        for folder in searched_first()
        for path, reason in _shadows(folder)
    ]
    if found:
        return found
    return [Finding(NAME, "ok", "nothing here or on PYTHONPATH hides a module, nor Hugging Face's `kernels`")]


def searched_first() -> list[Path]:
    """The current folder and those of PYTHONPATH."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [Path.cwd(), *(Path(name).absolute() for name in named if name)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _shadows(folder: Path) -> Iterator[tuple[Path, str]]:
    for name, path in sorted(_modules(folder).items()):
        if name in sys.stdlib_module_names and name not in UNUSED:
            yield path, f"hides Python's own module {name}"
        elif _installed_into(folder, name):
            continue
        elif name == KERNELS:
            yield path, "is taken for Hugging Face's `kernels` by transformers, which imports it"
        elif name in PACKAGES and _is_elsewhere(folder, name):
            yield path, f"hides the installed package {name}"


def _modules(folder: Path) -> dict[str, Path]:
    """What can be imported from a folder: files, and folders with an `__init__.py`, which alone hide something."""
    modules = {path.stem: path for path in folder.glob("*.py")}
    return modules | {path.parent.name: path.parent for path in folder.glob("*/__init__.py")}


def _installed_into(folder: Path, name: str) -> bool:
    """Whether pip put the package there (`pip install --target`), or it is developed there."""
    metadata = [path.name for path in folder.glob("*.*-info")]
    if any(each.startswith((f"{name}-", f"{name}.")) for each in metadata):
        return True
    # Distributions may be named unlike their modules, as pillow is.
    return name != KERNELS and any(each.endswith(".dist-info") for each in metadata)


def _is_elsewhere(folder: Path, name: str) -> bool:
    others = [entry for entry in sys.path if Path(entry).absolute() != folder]
    spec = PathFinder.find_spec(name, others)
    return spec is not None and spec.origin is not None
