"""Make every mistake as a user does, in a process of its own; prints one line of JSON, and what was not told well.

    python -m tests.faults.count_mistakes [--only WORD]

Told well is: exit code 2, nothing on stderr but one line of ours with the place and the remedy, nothing written. What
needs no torch must take less than 3 s of a core, from the start of Python on.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.mistakes import TOLD_AT_ONCE, Mistake
from tests.faults.mistakes_in_contents import CONTENTS
from tests.faults.mistakes_of_commands import COMMANDS_AFTER_TORCH, COMMANDS_AT_ONCE
from tests.loop.launching import REPOSITORY

TRAIN = [sys.executable, str(REPOSITORY / "fastcorl" / "train.py")]
COMMAND = [str(Path(sys.executable).parent / "fastcorl")]
AT_ONCE_SECONDS = 3.0


def make(mistake: Mistake, command: list[str]) -> tuple[float, float, list[str]]:
    """Seconds until it was told, and of them those of a core; what was not as it should be."""
    hidden = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mistake.make(folder)
        there = set(folder.rglob("*"))
        start, used = time.perf_counter(), core_seconds()
        done = subprocess.run(
            [*command, *mistake.options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        seconds, used = time.perf_counter() - start, core_seconds() - used
        written = set(folder.rglob("*")) - there
    checks = {
        f"exit code {done.returncode}": done.returncode == 2,
        "not one line": done.stderr.startswith("fastcorl: ") and done.stderr.count("\n") == 1,
        "a word is missing": all(word in done.stderr for word in mistake.words),
        f"written: {sorted(map(str, written))}": not written,
    }
    wrong = [what for what, passed in checks.items() if not passed]
    return seconds, used, [*wrong, done.stderr] if wrong else []


def core_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mistakes whose options have this word")
    only = parser.parse_args().only
    kinds = {
        "train_at_once": (TOLD_AT_ONCE, TRAIN),
        "train_after_torch": (CONTENTS, TRAIN),
        "command_at_once": (COMMANDS_AT_ONCE, COMMAND),
        "command_after_torch": (COMMANDS_AFTER_TORCH, COMMAND),
    }
    figures, failed = {}, 0
    for kind, (mistakes, command) in kinds.items():
        seconds, used = [], []
        for mistake in mistakes:
            if only not in " ".join(mistake.options):
                continue
            took, of_a_core, wrong = make(mistake, command)
            if kind.endswith("at_once") and of_a_core > AT_ONCE_SECONDS:
                wrong.append(f"took {of_a_core:.1f} s of a core")
            if wrong:
                failed += 1
                print(" ".join(mistake.options), *wrong, sep="\n    ", file=sys.stderr)
            seconds.append(took)
            used.append(of_a_core)
        if seconds:
            times = {"median_s": statistics.median(seconds), "slowest_s": max(seconds), "slowest_core_s": max(used)}
            figures[kind] = {"count": len(seconds), **{name: round(value, 2) for name, value in times.items()}}
    print(json.dumps({"mistakes": sum(each["count"] for each in figures.values()), "not_told_well": failed, **figures}))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
