"""Trials in other processes: whatever befalls one, the others are tried and it is one line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastcorl.system_checks.runner import TrialRunner
from fastcorl.system_checks.trials import GROUPS, TRIALS
from tests.loop.launching import REPOSITORY

GROUP = ("torch", "GPU", "CUDA", "deepspeed")


@pytest.fixture
def run(monkeypatch):
    """A group of trials of which some have a fate; the findings in a list."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(seconds=60, **fates):
        monkeypatch.setenv("STAND_IN", json.dumps(fates))
        return TrialRunner(seconds, "stand_in").run_group(GROUP)

    return run


def test_every_trial_is_in_one_group():
    assert sorted(name for group in GROUPS for name in group) == sorted(TRIALS)


def test_trials_that_work_share_a_process(run):
    findings = run()
    assert [finding.name for finding in findings] == list(GROUP)
    assert {finding.status for finding in findings} == {"ok"}
    assert len({finding.detail for finding in findings}) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="processes end otherwise")
@pytest.mark.parametrize(
    ("fate", "detail"),
    [
        ("segfault", "crashes with SIGSEGV"),
        ("exit", "ends Python with code 7: undefined symbol: _ZN3c10"),
        ("raise", "ImportError: no such thing"),
        ("hang", "does not end within 3 s"),
    ],
)
def test_a_trial_that_fails_is_one_line(run, fate, detail):
    findings = run(seconds=3 if fate == "hang" else 60, GPU=fate)
    assert [finding.name for finding in findings] == list(GROUP)
    assert [finding.status for finding in findings] == ["ok", "problem", "ok", "ok"]
    assert findings[1].detail == detail
    assert findings[1].remedy == TRIALS["GPU"].remedy and findings[1].needed
    assert findings[0].detail != findings[2].detail == findings[3].detail  # another process


def test_the_others_are_not_tried_without_the_first(run):
    first, *others = run(torch="raise")
    assert first.status == "problem"
    assert {(finding.status, finding.detail) for finding in others} == {("n/a", "not tried, since torch does not work")}
    assert len(others) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="interrupts are sent otherwise")
def test_an_interrupt_does_not_wait_for_what_hangs(monkeypatch):
    monkeypatch.setenv("STAND_IN", json.dumps({"torch": "hang", "NVML": "hang"}))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    code = (
        "from fastcorl.system_checks.runner import TrialRunner\n"
        "print('begins', flush=True)\n"
        "TrialRunner(600, 'stand_in').run([('torch', 'GPU'), ('NVML',)])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begins\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode and errors.endswith("KeyboardInterrupt\n")
