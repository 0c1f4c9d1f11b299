"""What a process grows by over many small steps with all of training in them; prints a line of JSON.

    python -m tests.faults.leak [--steps 600]

Exit code 1 if resident memory grows by more than 1 MB per 100 steps, or tensors, open files, threads or child
processes grow at all. Memory is read after glibc has given back what is free, which goes up and down by tens of MB.
It settles within 100 steps, so that fewer than 300 say little.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from fastcorl.config_loading import load_config
from fastcorl.pipeline import train
from fastcorl.runtime.telemetry import Telemetry

CONFIG = """
name: run
threads: 1
data: {max_prompt_tokens: 256}
rollout: {guidance: 3, max_new_tokens: 24, overlap: "on"}
algorithm: {group_size: 2, num_iterations: 2, eps_low: 0.2, eps_high: 0.2, dynamic_sampling: 1}
rewards:
  extra: {"tests.faults.noisy_reward:noisy": 0.5}
optimizer: {warmup_steps: 5, schedule: cosine, learning_rate: 1e-4}
packing: {tokens: 600}
evaluation: {num_prompts: 2, every: 20, gradient_cosine: true}
logging: {tensorboard: true, samples_every: 10, num_samples: 2}
checkpoint: {every: 50, keep: 2}
stages:
  unified: {task: unified, steps: 300, prompts_per_step: 1, beta: 0.1}
"""
WARM_UP = 50
LIMIT = 1.0  # MB per 100 steps


def resident_mb() -> float:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> int:
    return sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))


def counts() -> dict[str, int]:
    gc.collect()
    # By type: isinstance would ask proxies, some of which import what they stand for.
    kinds = [type(each) for each in gc.get_objects()]
    return {
        "objects": len(kinds),
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
        "children": children(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    memory: list[float] = []
    counted: dict[int, dict[str, int]] = {}
    write = Telemetry.write

    def measured(self: Telemetry, record) -> None:
        write(self, record)
        memory.append(resident_mb())
        if record.step % WARM_UP == 0:
            counted[record.step] = counts()

    Telemetry.write = measured
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "leak.yaml").write_text(CONFIG)
        options = [f"--config={folder}/leak.yaml", f"--output_dir={folder}", f"--stages.unified.steps={steps}"]
        train(load_config(options))
    slope = float(np.polyfit(np.arange(steps - WARM_UP), memory[WARM_UP:], 1)[0]) * 100
    first, *_, last = counted.values()
    grown = {name: last[name] - first[name] for name in first if name != "objects" and last[name] > first[name]}
    told = {
        "steps": steps,
        "mb_per_100_steps": round(slope, 2),
        "mb": {step: round(memory[step - 1]) for step in sorted({1, *counted})},
        "counts": counted,
        "grown": grown,
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps(told))
    sys.exit(1 if grown or slope > LIMIT else 0)


if __name__ == "__main__":
    main()
