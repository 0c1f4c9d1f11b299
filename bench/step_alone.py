"""Arithmetic and peak memory of a step in a process of its own: `python -m bench.step_alone PROBLEM PROVIDER`, as JSON.

`flop` is counted in the first step. Memory is that of the second: optimizer state, and buffers that are kept between
steps, are there before it. `peak_mib` is resident memory with everything in it, `extra_mib` what the step takes above
what was resident before it.
"""

import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path


def figures_of(problem: str, provider: str) -> dict[str, float]:
    """Runs steps of `provider` as bench/goals.py names them, in a fresh process."""
    command = [sys.executable, "-m", "bench.step_alone", problem, provider]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, provider: str) -> None:
    from bench.arithmetic import counted
    from bench.goals import BASELINE
    from bench.peers.ours_step import OurStep
    from bench.step_problems import PROBLEMS

    problem = PROBLEMS[name]
    policy = problem.policy()
    if provider == BASELINE:
        baseline, prompts = problem.baseline(policy), problem.make_prompts()
        del policy  # the baseline has a copy of its own

        def step():
            baseline.step(prompts)
    else:
        step = OurStep(problem.trainer(policy)).step

    flop = counted(step)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    held = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    step()
    peak = _status_mib("VmHWM")
    print(json.dumps({"flop": flop, "peak_mib": peak, "extra_mib": peak - held}))


def _status_mib(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
