"""Children that do not find all that is installed; see hidden_modules/sitecustomize.py."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from tests.loop.launching import REPOSITORY, environment

HIDDEN_MODULES = Path(__file__).parent / "hidden_modules"
ONE_LOSS = """
import torch
from fastcorl_kernels import linear_grpo_loss

hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
ids, bounds = torch.randint(50, (6,)), torch.tensor([0, 2, 6])
result = linear_grpo_loss(hidden, head, ids, torch.tensor([1.0, -1.0]), cu_seqlens=bounds)
result.loss.backward()
assert result.loss.isfinite() and head.grad.isfinite().all()
for name in ("transformers", "triton", "fastcorl", "kernels"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
"""


def python_path(*folders: Path | str) -> str:
    return os.pathsep.join(map(str, folders))


def run(command: list[str], folder: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess:
    """The command in a folder, with these environment variables; it must succeed."""
    result = subprocess.run(
        command, cwd=folder, env={**environment(), **variables}, timeout=120, text=True, capture_output=True
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result


def torch_and_what_it_requires() -> set[str]:
    """Import names; those of what torch requires are the names of the distributions."""
    names, left = set(), ["torch"]
    while left:
        name = left.pop()
        if name not in names:
            names.add(name)
            try:
                required = map(Requirement, requires(name) or ())
            except PackageNotFoundError:
                continue
            left += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    modules = {name.lower().replace("-", "_") for name in names}
    return modules - {"triton"} | {"nvidia", "torchgen"}  # CUDA's libraries share a name; torchgen comes with torch


def compute_a_loss(folder: Path) -> None:
    """With what is in `folder` and torch, and nothing else that is installed."""
    only = " ".join({*torch_and_what_it_requires(), "fastcorl_kernels"})
    # Away from the repository, which `python -c` would search.
    with_hook = python_path(HIDDEN_MODULES, folder)
    run([sys.executable, "-c", ONE_LOSS], folder, PYTHONPATH=with_hook, ONLY_MODULES=only)
