"""Traps of the layout, each measured once: see ARCHITECTURE.md."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_kernels_folder_is_not_a_package():
    # transformers imports a package called `kernels` when it finds one.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "fastcorl" / "kernels").exists()
    assert not (ROOT / "fastcorl" / "kernels.py").exists()


def test_no_module_bears_the_name_of_another_package():
    # `deepspeed fastcorl/train.py` puts fastcorl/ first on the path before train.py can replace it.
    ours = {path.stem for path in (ROOT / "fastcorl").glob("*.py")} - {"__init__"}
    ours |= {path.parent.name for path in (ROOT / "fastcorl").glob("*/__init__.py")}
    assert "config" in ours
    others = set(sys.stdlib_module_names) | set(packages_distributions())
    assert ours.isdisjoint(others), sorted(ours & others)


def test_version_is_written_once():
    import fastcorl

    assert f'"{fastcorl.__version__}"' not in (ROOT / "pyproject.toml").read_text()
