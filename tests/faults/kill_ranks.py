"""Seconds from the death of one of two ranks to the end of the other, phase by phase, and whether the run resumes.

python tests/faults/kill_ranks.py
"""

import json
import tempfile
import time
from pathlib import Path

from tests.faults.dying_run import PHASES
from tests.faults.test_dying import ended, start
from tests.loop.launching import read_metrics

MARK = "the second rank dies"


def main() -> None:
    for phase in PHASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            process = start(folder, phase, 2)
            for line in process.stdout:
                if MARK in line:
                    break
            died = time.perf_counter()
            code, _, _ = ended(process, 300)
            seconds = time.perf_counter() - died
            process = start(folder, "none", 0, "--resume=auto")
            resumed, output, _ = ended(process, 300)
            steps = [line["step"] for line in read_metrics(folder / "run")]
            whole = resumed == 0 and steps == [1, 2, 3, 4]
            print(
                json.dumps({"phase": phase, "exit": code, "seconds": round(seconds, 1), "resumed": whole}), flush=True
            )
            if not whole:
                print(output)


if __name__ == "__main__":
    main()
