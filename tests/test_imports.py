"""The ways to launch, with and without packages that may be absent.

Not the product, since a process that imports all of training takes six seconds of a core: each way to launch once, with
a stand-in for Hugging Face's `kernels` installed, and where modules are then found; and all that training imports in
two processes, in which each package is absent once and, where it is installed, present once. Triton is absent alone,
with those that would use it there.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.isolation import HIDDEN_MODULES, compute_a_loss, python_path, run
from tests.loop.launching import REPOSITORY, environment

TRAIN = "fastcorl/train.py"
LAUNCHES = {
    "file": [sys.executable, TRAIN],
    "module": [sys.executable, "-m", "fastcorl.train"],
    "PYTHONPATH": [sys.executable, "-m", "fastcorl.train"],
    "deepspeed": ["deepspeed", "--num_gpus", "1", TRAIN],
}
EVERYTHING = """
import sys
import fastcorl.cli, fastcorl.dry_run, fastcorl.exports, fastcorl.pipeline, fastcorl.train
missing = [name for name in sys.argv[1].split() if name in sys.modules]
assert not missing, missing
sys.argv[1:] = ["--help"]
fastcorl.train.main()
"""


def install_kernels(folder: Path) -> Path:
    """A package and its metadata, as pip would install Hugging Face's `kernels`, of a version that transformers does
    not use."""
    package, information = folder / "kernels", folder / "kernels-0.0.1.dist-info"
    for each in (package, information):
        each.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.1"\n')
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    return package


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_finds_every_module_where_it_is_installed(launch, tmp_path):
    command = LAUNCHES[launch]
    if shutil.which(command[0], path=environment()["PATH"]) is None:
        pytest.skip(f"{command[0]} is not installed")
    kernels = install_kernels(tmp_path / "site")
    path = [HIDDEN_MODULES, tmp_path / "site"]
    folder = REPOSITORY
    if launch == "PYTHONPATH":
        path += [REPOSITORY, REPOSITORY / "kernels"]
        folder = tmp_path
    found = tmp_path / "found"
    result = run([*command, "--help"], folder, PYTHONPATH=python_path(*path), FOUND_MODULES=str(found))
    assert "--rollout.temperature" in result.stdout
    (modules,) = map(json.loads, found.read_text().splitlines())
    assert modules["kernels"] == str(kernels / "__init__.py")
    assert modules["fastcorl"] == str(REPOSITORY / "fastcorl" / "__init__.py")
    assert modules["fastcorl_kernels"] == str(REPOSITORY / "kernels" / "fastcorl_kernels" / "__init__.py")
    for name in ("datasets", "transformers"):
        assert modules[name] == importlib.util.find_spec(name).origin
    assert Path(modules["types"]).parent == Path(os.__file__).parent


def test_a_launch_under_pytest(monkeypatch, capsys):
    from fastcorl import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        train.main()
    assert not exit_info.value.code and "--rollout.temperature" in capsys.readouterr().out
    spec = importlib.util.find_spec("fastcorl_kernels")
    assert spec.origin == str(REPOSITORY / "kernels" / "fastcorl_kernels" / "__init__.py")


@pytest.mark.parametrize("absent", ["triton", "kernels deepspeed liger_kernel"])
def test_training_imports_without(absent):
    result = run(
        [sys.executable, "-c", EVERYTHING, absent], PYTHONPATH=python_path(HIDDEN_MODULES), HIDDEN_MODULES=absent
    )
    assert "--rollout.temperature" in result.stdout


def test_the_kernels_need_torch_alone():
    compute_a_loss(REPOSITORY / "kernels")
