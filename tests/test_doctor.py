"""`fastcorl doctor`: the report on the system, its exit codes, and the flags of its two halves."""

import json
import subprocess
import sys
import time

import pytest

from fastcorl.cli import main
from fastcorl.commands import doctor_system
from fastcorl.system_checks.findings import Finding
from tests.isolation import python_path
from tests.loop.launching import REPOSITORY, environment

FIT = {"machine": [Finding("GPU", "n/a", "none"), Finding("disk", "ok", "runs has 60.0 GiB free")]}
LIMPING = {"tried": [Finding("Liger", "problem", "crashes with SIGSEGV", "leave model.liger at auto")]}
BROKEN = {"tried": [Finding("torch", "problem", "ImportError: libcudart", "reinstall torch", needed=True)]}
DATA = ["--data", "fastcorl.quickstart.data:held_out", "--max-rows", "4"]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(report, *arguments):
        monkeypatch.setattr(doctor_system, "examine_system", lambda output_dir, seconds: report)
        code = 0
        try:
            main(["doctor", *arguments])
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("report", "code", "last"),
    [
        (FIT, 0, "nothing that is needed is broken"),
        ({**FIT, **LIMPING}, 0, "nothing that is needed is broken"),
        ({**FIT, **BROKEN}, 1, "needed and broken: torch"),
    ],
)
def test_exit_codes(run, report, code, last):
    found, text = run(report)
    assert (found, text.splitlines()[-1]) == (code, last)
    found, text = run(report, "--json")
    assert (found, json.loads(text)["ok"]) == (code, code == 0)


def test_a_finding_is_a_line(run):
    text = run({**FIT, **LIMPING})[1]
    assert "  disk   ok       runs has 60.0 GiB free\n" in text
    assert "  GPU    n/a      none\n" in text
    assert "  Liger  problem  crashes with SIGSEGV; leave model.liger at auto\n" in text
    assert "broken, but training goes without: Liger\n" in text


def test_data_alone_and_with_the_system(run):
    code, text = run(BROKEN, *DATA)
    assert code == 0 and "looked at 4" in text and "torch" not in text
    code, text = run(BROKEN, "--system", *DATA)
    assert code == 1 and "looked at 4" in text and "needed and broken: torch" in text


@pytest.mark.parametrize(
    "arguments", [["--json", *DATA], ["--columns", "prompt", "text"], ["--max-rows", "4"], ["--timeout", "0"]]
)
def test_flags_that_do_not_go_together(run, arguments):
    assert run(FIT, *arguments)[0] == 2


def test_a_shadow_of_kernels_is_found_by_the_whole_command(tmp_path):
    """In a folder where transformers cannot be imported, the report says why, and is whole."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('not that one')\n")
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "fastcorl.doctor", "--json"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": python_path(REPOSITORY, REPOSITORY / "kernels")},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    found = {each["name"]: each for section in ("machine", "tried") for each in report[section]}
    assert found["transformers"]["status"] == "problem" and found["transformers"]["needed"]
    assert "from RuntimeError: not that one" in found["transformers"]["detail"]
    assert str(tmp_path / "kernels") in found["module names"]["detail"]
    assert found["attention auto"]["detail"] == "not tried, since transformers does not work"
    assert found["torch"]["status"] == found["kernels torch"]["status"] == found["disk"]["status"] == "ok"
    assert time.perf_counter() - start < 60
