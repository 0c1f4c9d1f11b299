"""Two ranks under a launcher: SIGTERM, and a rank that dies. The run ends in time and goes on where it was."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastcorl.runtime.checkpoints import problem_of
from tests.faults.test_stopping import SMALL
from tests.loop.launching import REPOSITORY, environment, read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(folder, phase, step, *options):
    """Two ranks, in a process group of their own; `dying_run.PHASES`, or "none", names where the second one dies."""
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(SMALL)
    arguments = [f"--config={folder / 'small.yaml'}", f"--output_dir={folder}", *options]
    return subprocess.Popen(
        [*TORCHRUN, "tests/faults/dying_run.py", phase, str(step), *arguments],
        cwd=REPOSITORY,
        env=environment() | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ended(process, seconds):
    """Exit code, output and seconds until every process of the group is gone."""
    begin = time.perf_counter()
    output, _ = process.communicate(timeout=seconds)  # the pipe closes with the last of them
    return process.returncode, output, time.perf_counter() - begin


def wait_for_line(process, folder, count):
    path = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= count):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return tmp_path_factory.mktemp("dying")


@pytest.mark.slow
def test_sigterm_then_a_dead_rank_then_the_end(folder):
    process = start(folder, "none", 0, "--checkpoint.every=100", "--stages.unified.steps=60")
    wait_for_line(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    code, output, seconds = ended(process, 60)
    assert code != 0 and seconds < 30, output
    (saved,) = (path for path in (folder / "run" / "checkpoints").glob("step-*"))
    last = int(saved.name.removeprefix("step-"))
    assert problem_of(saved) is None
    assert [line["step"] for line in read_metrics(folder / "run")] == list(range(1, last + 1))

    steps = f"--stages.unified.steps={last + 3}"
    process = start(folder, "save", 2, "--resume=auto", steps)
    code, output, _ = ended(process, 150)
    assert code != 0
    assert f"unified: resumed at step {last + 1}" in output

    process = start(folder, "none", 0, "--resume=auto", steps)
    code, output, _ = ended(process, 150)
    assert code == 0, output
    assert f"unified: resumed at step {last + 2}" in output
    assert [line["step"] for line in read_metrics(folder / "run")] == list(range(1, last + 4))
    assert not list((folder / "run" / "checkpoints").glob("tmp-*"))
    assert os.path.exists(folder / "run" / "export" / "unified")
