"""The wheel: it builds without a network, holds what training needs and nothing of the tests, and works installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.isolation import compute_a_loss, run
from tests.loop.launching import REPOSITORY

SOURCES = ("fastcorl", "kernels", "configs", "tests", "bench", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its own files beside the sources, and takes them for sources later."""
    if any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")):
        pytest.skip("pip and setuptools are not both installed, and this is to need no network")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", *options], cwd=copy, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    target = wheel.parent / "target"
    options = ["--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, timeout=120)
    return target


def test_the_wheel_has_all_of_the_packages_and_no_tests(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(root).as_posix()
        for root, package in ((REPOSITORY, "fastcorl"), (REPOSITORY / "kernels", "fastcorl_kernels"))
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configurations = (path for path in (REPOSITORY / "configs").rglob("*") if path.is_file())
    expected |= {f"fastcorl/{path.relative_to(REPOSITORY).as_posix()}" for path in configurations}
    assert packed == expected
    assert {"fastcorl/quickstart/weights/janus/model.safetensors", "fastcorl/configs/quickstart.yaml"} <= packed


def test_the_installed_kernels_need_torch_alone(installed):
    compute_a_loss(installed)


def test_the_installed_trainer_has_its_configuration(installed, tmp_path):
    code = (
        "import fastcorl; from fastcorl.config_loading import load_config; from importlib.resources import files;"
        "print(fastcorl.__file__, load_config([]).name, (files('fastcorl') / 'configs/presets/paper.yaml').is_file())"
    )
    result = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert result.stdout.split() == [str(installed / "fastcorl" / "__init__.py"), "quickstart", "True"]
    train = [sys.executable, "-m", "fastcorl.train", "--help"]
    assert "--rollout.temperature" in run(train, tmp_path, PYTHONPATH=os.fspath(installed)).stdout
