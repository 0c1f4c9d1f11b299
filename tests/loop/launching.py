"""Running the trainer as a user does, in a child process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SMALL_RUN = REPOSITORY / "tests" / "small_run.yaml"


def environment() -> dict[str, str]:
    """Of runs on the CPU, also where there are GPUs, of which two ranks would need two."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def run_python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`python fastcorl/train.py ...`"""
    return _run([sys.executable, "fastcorl/train.py", *arguments], check)


def run_deepspeed(*arguments: str, ranks: int, check: bool = True) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus N fastcorl/train.py ...`"""
    if shutil.which("deepspeed", path=environment()["PATH"]) is None:
        pytest.skip("deepspeed is not installed")
    with socket.socket() as probe:  # the launcher's own port may be another run's
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)]
    return _run([*launcher, "fastcorl/train.py", *arguments], check)


def read_metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _run(command: list[str], check: bool) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), timeout=600, text=True, capture_output=True, check=False
    )
    if check and result.returncode:
        pytest.fail(f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result
