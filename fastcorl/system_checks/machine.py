"""The disk that runs are written to, and the compiler of torch.compile."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from fastcorl.system_checks.findings import Finding, first_line

GIB = 2**30
LEAST_FREE_GIB = 1
COMPILE_SECONDS = 30

# What the code that torch.compile writes for a CPU begins with.
SOURCE = """#include <Python.h>
#include <cmath>
extern "C" double fastcorl_probe(double x) { return std::exp(x); }
"""


def check_disk(folder: Path) -> list[Finding]:
    """Whether the folder that is to hold runs can be written, and how much fits."""
    name, remedy = "disk", "give another folder, as in --output_dir of training"
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        return [Finding(name, "problem", f"{folder} cannot be written: {error.strerror}", remedy, needed=True)]
    detail = f"{folder} has {free:,.1f} GiB free"
    if free < LEAST_FREE_GIB:
        return [Finding(name, "problem", detail, f"make room, or {remedy}", needed=True)]
    return [Finding(name, "ok", detail)]


def check_compiler() -> list[Finding]:
    """Whether a C++ file that includes Python's headers compiles."""
    name, user = "C++ compiler", "model.compile"
    if sys.platform == "win32":
        return [Finding(name, "n/a", f"not looked for on Windows; {user} would need MSVC")]
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++", "c++"])), None)
    if compiler is None and named:
        return [Finding(name, "problem", f"CXX is {named}, which is not there", "unset CXX, or install it")]
    if compiler is None:
        return [Finding(name, "n/a", f"none; {user} would need g++")]
    with tempfile.TemporaryDirectory(prefix="fastcorl-doctor-") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(SOURCE)
        flags = ["-shared", "-fPIC", *([] if sys.platform == "darwin" else ["-fopenmp"])]
        if sys.platform == "darwin":
            flags += ["-undefined", "dynamic_lookup"]
        command = [compiler, *flags, f"-I{sysconfig.get_path('include')}", str(source), "-o", f"{folder}/probe.so"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
            said = result.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            return [Finding(name, "problem", f"{compiler}: {first_line(error)}", f"leave {user} off")]
    if result.returncode:
        reason = next((line for line in said.splitlines() if "error" in line), said.strip()[:200])
        remedy = f"install Python's headers (python3-dev) and OpenMP, or leave {user} off"
        return [Finding(name, "problem", f"{compiler} fails: {reason}", remedy)]
    return [Finding(name, "ok", f"{compiler}, with Python's headers")]
