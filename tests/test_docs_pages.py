"""The tutorial and the page on extending do what they say: their blocks run in order, in a folder of their own.

A block whose first line is `# name.ext` is written to that file. In a `console` block the lines behind `$` are run, and
the others are what they print. Other Python is executed, and a `text` block behind it is what it prints.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w/]+\.\w+)\n")
LIBRARY_NOTE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[")  # such as DeepSpeed's on its accelerator


def pieces(page):
    """What a page asks for, in order: (kind, content, what is printed)."""
    blocks = BLOCK.findall((ROOT / "docs" / page).read_text())
    for place, (language, text) in enumerate(blocks):
        if language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command = re.match(r"(?:.*\\\n)*.*", part)[0]
                yield "command", command, part.removeprefix(command).strip("\n")
        elif name := FILE.match(text):
            yield "file", name[1], text
        elif language == "python":
            follows = blocks[place + 1] if place + 1 < len(blocks) else ("", "")
            yield "python", text, follows[1] if follows[0] == "text" else ""


def lines_of(text):
    """Its lines with every number as #, every duration as #s, and one space for several."""
    text = re.sub(r"\b(?:\d+[dhm])*\d+[hms]\b", "#s", text)
    text = re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line]


def assert_shown(shown, printed, what):
    """`...` stands for the rest of a line, or on its own for any number of lines."""
    expected = ""
    for line in lines_of(shown):
        if line == "...":
            expected += r"(?:.*\n)*?"
        else:
            expected += ".*".join(map(re.escape, line.split("..."))) + r"\n"
    kept = "\n".join(line for line in printed.splitlines() if not LIBRARY_NOTE.match(line))
    got = "".join(line + "\n" for line in lines_of(kept))
    assert re.fullmatch(expected, got), f"{what}\nprints\n{printed}\nthe page shows\n{shown}"


def status_of(shown):
    """A mistake of the user ends with 2, a check that is not passed with 1."""
    return 2 if shown.startswith("fastcorl: ") else 1 if "too many" in shown else 0


def run(command, shown, folder):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "FORCE_COLOR", "COLUMNS"))
    }
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status_of(shown), f"$ {command}\n{done.stdout}{done.stderr}"
    # Progress and warnings of libraries go to stderr, and so does a mistake of the user, which is then all there is.
    assert_shown(shown, done.stderr if done.returncode == 2 else done.stdout, f"$ {command}")


def follow(page, folder):
    """Do what a page says; how many commands and pieces of code it has."""
    names: dict = {"__name__": "page"}
    counts = {"file": 0, "command": 0, "python": 0}
    for kind, content, shown in pieces(page):
        counts[kind] += 1
        if kind == "file":
            (folder / content).write_text(shown)
        elif kind == "command":
            run(content, shown, folder)
        else:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(content, page, "exec"), names)
            assert_shown(shown, printed.getvalue(), content)
    return counts


def test_tutorial(tmp_path):
    (tmp_path / "fastcorl").symlink_to(ROOT / "fastcorl")  # the tutorial is followed in a folder in the clone
    folder = tmp_path / "hour"
    folder.mkdir()
    counts = follow("tutorial.md", folder)
    assert counts["command"] >= 15 and counts["file"] >= 3


def test_extending(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    counts = follow("extending.md", tmp_path)
    assert counts["python"] >= 8


LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md"]


@pytest.mark.parametrize("page", PAGES + sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
def test_links_and_pages_named_exist(page):
    text = (ROOT / page).read_text()
    for target, _ in LINK.findall(text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target
    for name in re.findall(r"`(docs/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_list():
    listed = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in listed, path.name
