"""The interpreter accepts what the compiler does not, so the kernels are compiled as well; that needs no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHARED_MEMORY = 227 * 1024  # bytes that a program can have on Hopper


def test_every_kernel_compiles_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py"))]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    compiled = dict(line.split() for line in run.stdout.splitlines())
    sources = (REPOSITORY / "kernels").rglob("triton_kernels.py")
    written = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert set(compiled) == written
    assert max(map(int, compiled.values())) <= SHARED_MEMORY
