"""What a user can get wrong gives one line and exit code 2 before any training, and writes nothing.

`python -m tests.faults.count_mistakes` types the same mistakes as a user does, and times them.
"""

import importlib
import sys

import pytest

from fastcorl import cli, train
from tests.faults.mistakes import TOLD_AT_ONCE
from tests.faults.mistakes_in_contents import CONTENTS
from tests.faults.mistakes_of_commands import COMMANDS_AFTER_TORCH, COMMANDS_AT_ONCE

# What imports torch.
HEAVY = ("data", "model", "rollout", "pipeline", "evaluation", "algorithm", "exports", "runtime.report")


def named(mistakes):
    return [pytest.param(each, id=" ".join([*each.options, each.words[-1]])[:90]) for each in mistakes]


@pytest.fixture
def make(tmp_path, monkeypatch, capfd):
    """Make a mistake, in the current folder; returns the one line that told it."""

    def make(mistake, main):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["train.py", *mistake.options])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        importlib.invalidate_caches()
        mistake.make(tmp_path)
        there = set(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_info:
            main()
        sys.modules.pop("mine", None)
        assert exit_info.value.code == 2
        assert set(tmp_path.rglob("*")) == there
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastcorl: ")]
        assert len(lines) == 1
        return lines[0]

    return make


@pytest.fixture
def no_torch(monkeypatch):
    for name in HEAVY:
        monkeypatch.setitem(sys.modules, f"fastcorl.{name}", None)


def assert_told(line, mistake):
    assert [word for word in mistake.words if word not in line] == [], line


@pytest.mark.parametrize("mistake", named(TOLD_AT_ONCE))
def test_told_at_once(make, no_torch, mistake):
    assert_told(make(mistake, train.main), mistake)


@pytest.mark.parametrize("mistake", named(CONTENTS))
def test_told_before_training(make, mistake):
    assert_told(make(mistake, train.main), mistake)


@pytest.mark.parametrize("mistake", named(COMMANDS_AT_ONCE))
def test_told_by_commands_at_once(make, no_torch, mistake):
    assert_told(make(mistake, cli.main), mistake)


@pytest.mark.parametrize("mistake", named(COMMANDS_AFTER_TORCH))
def test_told_by_commands(make, mistake):
    line = make(mistake, cli.main)
    assert_told(line, mistake)
    assert "rollout." not in line


def test_batch_that_does_not_divide(make, monkeypatch):
    """Two ranks cannot share seven prompts; each is told without the other."""
    from tests.faults.mistakes import Mistake

    monkeypatch.setenv("WORLD_SIZE", "2")
    mistake = Mistake(["--stages.unified.prompts_per_step=7"], ())
    line = make(mistake, train.main)
    assert "stages.unified.prompts_per_step 7 does not divide by 2 ranks; give a multiple of it" in line
