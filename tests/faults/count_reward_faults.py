"""Train with rewards that fail in every way; prints a line of JSON for each, and the sum.

    python -m tests.faults.count_reward_faults [--only NAME]

Each fault is met in all three steps of a run on the shipped model, with a deadline of 2 s. The run must go on to its
end and count each failure in metrics.jsonl, and no step may wait for scores longer than with a good reward by more than
the deadline and a second. A run of eight steps must end at the fifth failure, with the reason and exit code 2.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import fastcorl.pipeline  # noqa: F401, once for all runs
from fastcorl import train
from tests.faults import faulty_rewards
from tests.loop.launching import SMALL_RUN, read_metrics

DEADLINE = 2.0
STEPS, STEPS_OF_LONG_RUN = 3, 8
SMALL = f"""
extends: {SMALL_RUN}
output_dir: .
checkpoint: {{every: 0}}
stages:
  unified: {{task: unified, steps: 3, prompts_per_step: 2}}
"""
# What a call that fails says. Values that are not finite, or None, are no failure: their rows are not scored.
REASONS = {
    "raises": "RuntimeError: no judge today",
    "exits": "SystemExit: 3",
    "hangs": "not done after 2 s, stopped",
    "spins": "not done after 2 s, stopped",
    "is_killed": "its process was ended by SIGKILL, perhaps for lack of memory",
    "exits_at_once": "its process ended with exit code 5",
    "aborts": "its process was ended by SIGABRT",
    "crashes": "its process was ended by SIGSEGV",
    "lacks_memory": "MemoryError",
    "hangs_in_a_thread": "not done after 2 s, stopped",
    "closes_all_files": "its process ended",
    "nothing": "returned None, not a sequence of 4 numbers",
    "too_few": "returned 3 values, 4 were asked for",
    "too_many": "returned 5 values, 4 were asked for",
    "words": "returned a str as value 0, not a number or None",
    "a_number": "returned a float, not a sequence of 4 numbers",
}
UNSCORED = ("nothing_finite", "infinite", "none_for_all")
ENDING = ("raises", "is_killed", "too_few")


class Ended(NamedTuple):
    exit: int
    printed: str
    metrics: list[dict]


def run(name: str, steps: int) -> Ended:
    """A run with one reward of a user's, in a fork of this process, which has imported what takes seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "faulty.py").write_text(Path(faulty_rewards.__file__).read_text())
        (folder / "small.yaml").write_text(SMALL)
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            for stream in (1, 2):
                os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            options = ["--config", "small.yaml", f"--stages.unified.steps={steps}", f"--rewards.timeout={DEADLINE}"]
            sys.argv = ["train.py", *options, "--rewards.extra", f"faulty:{name}", "0.5"]
            code = 1
            try:
                train.main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        metrics = read_metrics(folder / "run") if (folder / "run" / "metrics.jsonl").exists() else []
        return Ended(os.waitstatus_to_exitcode(status), (folder / "printed").read_text(), metrics)


def waits(metrics: list[dict]) -> list[float]:
    """Seconds of each step in which nothing was done but to score."""
    return [line["seconds"]["score"] for line in metrics]


def tell(figures: dict) -> bool:
    print(json.dumps(figures), flush=True)
    return figures["passed"]


def goes_on(name: str, usual: list[float]) -> bool:
    exit_code, printed, metrics = run(name, STEPS)
    added = [mine - theirs for mine, theirs in zip(waits(metrics), usual, strict=False)]
    failed = [line["metrics"]["failed_rewards"] for line in metrics]
    unscored = [line["metrics"]["unscored_rows"] for line in metrics]
    told = name in UNSCORED or " ".join(printed.split()).count(REASONS[name]) == STEPS
    checks = {
        "exit": exit_code == 0,
        "steps": [line["step"] for line in metrics] == list(range(1, STEPS + 1)),
        "failures counted": failed == [float(name not in UNSCORED)] * STEPS and unscored == [1.0] * STEPS,
        "told": told,
        "in time": max(added) <= DEADLINE + 1,
    }
    wrong = [what for what, passed in checks.items() if not passed]
    if wrong:
        print(printed, file=sys.stderr)
    return tell(
        {
            "fault": name,
            "exit": exit_code,
            "failed": failed,
            "added_s": [round(each, 1) for each in added],
            "passed": not wrong,
            **({"wrong": wrong} if wrong else {}),
        }
    )


def ends(name: str) -> bool:
    exit_code, printed, metrics = run(name, STEPS_OF_LONG_RUN)
    lines = [line for line in printed.splitlines() if line.startswith("fastcorl: ")]
    told = f"reward faulty:{name} failed in 5 of its last 5 calls, so the run ends; the last time: {REASONS[name]}"
    passed = exit_code == 2 and len(metrics) == 4 and len(lines) == 1 and told in lines[0]
    return tell({"fault": name, "ends": True, "exit": exit_code, "steps": len(metrics), "passed": passed})


def once() -> bool:
    """A failure of one step is that step's alone."""
    exit_code, printed, metrics = run("now_and_then", STEPS)
    failed = [line["metrics"]["failed_rewards"] for line in metrics]
    passed = exit_code == 0 and failed == [0.0, 1.0, 0.0]
    return tell({"fault": "now_and_then", "exit": exit_code, "failed": failed, "passed": passed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one fault")
    only = parser.parse_args().only
    usual = waits(run("fine", STEPS).metrics)
    names = [only] if only else [*REASONS, *UNSCORED]
    results = [goes_on(name, usual) for name in names]
    if not only:
        results += [ends(name) for name in ENDING] + [once()]
    print(json.dumps({"faults": len(names), "runs": len(results), "passed": sum(results)}))
    raise SystemExit(not all(results))


if __name__ == "__main__":
    main()
