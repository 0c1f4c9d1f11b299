"""Names of files that hide modules."""

import pytest

from fastcorl.system_checks.shadows import check_module_names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    here, path = tmp_path / "here", tmp_path / "path"
    here.mkdir()
    path.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(path))
    return tmp_path


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def problems():
    return [finding.detail for finding in check_module_names() if finding.status == "problem"]


@pytest.mark.parametrize("place", ["here", "path"])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("types.py", "hides Python's own module types"),
        ("logging/__init__.py", "hides Python's own module logging"),
        ("kernels/__init__.py", "is taken for Hugging Face's `kernels` by transformers, which imports it"),
        ("kernels.py", "is taken for Hugging Face's `kernels` by transformers, which imports it"),
        ("datasets.py", "hides the installed package datasets"),
        ("torch/__init__.py", "hides the installed package torch"),
    ],
)
def test_a_shadow(folder, place, file, reason):
    write(folder / place / file)
    (finding,) = check_module_names()
    hiding = (folder / place / file).parent if file.endswith("__init__.py") else folder / place / file
    assert (finding.status, finding.needed) == ("problem", True)
    assert finding.detail == f"{hiding} {reason}"
    assert finding.remedy == f"rename {hiding.name}, or run from elsewhere"


def test_what_hides_nothing(folder):
    # A folder without `__init__.py` gives way to a package, and nobody imports Python's own `test`.
    for file in ("here/kernels/README.md", "here/wandb/run", "here/test/__init__.py", "here/my_rewards.py"):
        write(folder / file)
    # What is installed or developed there is the package.
    write(folder / "path" / "kernels" / "__init__.py")
    write(folder / "path" / "kernels-0.9.dist-info" / "METADATA")
    write(folder / "path" / "PIL" / "__init__.py")
    assert problems() == []


def test_what_is_installed_beside_a_shadow_does_not_excuse_it(folder):
    write(folder / "path" / "kernels" / "__init__.py")
    write(folder / "path" / "pillow-13.dist-info" / "METADATA")
    assert len(problems()) == 1


def test_a_repository_of_fastcorl_hides_nothing(folder, monkeypatch):
    from tests.loop.launching import REPOSITORY

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "kernels"))
    assert problems() == []
