"""Two runs with one seed, bit for bit, and one with another; prints a line of JSON per case.

    python -m tests.faults.determinism [--steps 20]

Exit code 1 if a bit differs between equal seeds, or if a drawing is the same under another seed, on another rank or in
another row.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.resume_equality import CASES, compare_steps, finished
from tests.faults.run_states import compare_runs, read_steps

TRIED = ("plain", "zero 1, 2 ranks")


def drawings(folder: Path, rank: int) -> Counter[str]:
    return Counter(drawing for line in read_steps(folder, rank) for drawing in line["drawings"])


def try_case(name: str, folder: Path, steps: int) -> dict:
    start = time.perf_counter()
    case = CASES[name]
    seeds = {"one": 0, "again": 0, "other": 1}
    for run, seed in seeds.items():
        finished(folder / run, case, f"--seed={seed}", f"--stages.unified.steps={steps}", "--stages.t2i.steps=1")
    one, again, other = (folder / run for run in seeds)
    found = compare_runs(one / "run", again / "run")
    ranks = range(max(1, case.ranks))
    drawn = sum((drawings(one, rank) for rank in ranks), Counter())
    under_other = sum((drawings(other, rank) for rank in ranks), Counter())
    return {
        "case": name,
        "steps": compare_steps(found, one, again, case.ranks),
        "tensors": found.tensors,
        "values": found.values,
        "differing_bits": found.differing_bits,
        "differences": found.differences[:20],
        "drawings": drawn.total(),
        "drawn_twice": drawn.total() - len(drawn),  # in any two rows, of one rank or two
        "same_under_another_seed": len(drawn.keys() & under_other.keys()),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    good = True
    for name in TRIED:
        with tempfile.TemporaryDirectory() as folder:
            told = try_case(name, Path(folder), steps)
        print(json.dumps(told), flush=True)
        good = good and not (told["differences"] or told["drawn_twice"] or told["same_under_another_seed"])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
