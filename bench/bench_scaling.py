"""Steps on two ranks, one thread each, with as many prompts per rank as one rank has alone: through the launcher, as a
user runs it.

Two ranks share more than the network between them: caches, memory and the clock of one processor. So two runs of one
rank that know nothing of one another run, too, at the same time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import yaml

from bench.goals import OURS
from fastcorl.runtime.telemetry import read_records

ROOT = Path(__file__).resolve().parents[1]
ALONE, AT_ONCE = "1 rank", "2 runs of 1 rank at once"
PROMPTS, WARMUP, STEPS = 8, 1, 5
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def bench_ranks(benchmark, tmp_path):
    steps = {ALONE: [], AT_ONCE: [], OURS: []}

    def others():
        steps[ALONE] += run(tmp_path, ranks=1)
        steps[AT_ONCE] += run(tmp_path, ranks=1, runs=2)

    benchmark.group = "scaling: 1 to 2 ranks"
    benchmark.pedantic(lambda: steps[OURS].extend(run(tmp_path, ranks=2)), setup=others, rounds=1)
    if benchmark.enabled:
        communication = all_reduce_seconds(trained_parameters())
        benchmark.extra_info["entries"] = [
            entry(provider, steps, communication if provider == OURS else 0.0) for provider in steps
        ]


def entry(provider, steps, communication):
    """`efficiency`: the time of a step on one rank over that of one with as many samples per rank, without gradients'
    way to the other rank."""
    seconds = {name: median(each["total"] for each in taken) for name, taken in steps.items()}
    return {
        "op": "scaling",
        "shape": "quickstart, 2 ranks",
        "provider": provider,
        "median_s": seconds[provider],
        "ratio_to_ours": seconds[provider] / seconds[OURS],
        "communication_s": communication,
        "efficiency": seconds[ALONE] / (seconds[provider] - communication),
        "phases_s": {name: median(each[name] for each in steps[provider]) for name in steps[provider][0]},
    }


def run(folder, *, ranks, runs=1):
    """Seconds by phase of the steps of `runs` runs at the same time, the first steps left out; means over runs."""
    names = [f"run{number}" for number in range(runs)]
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    unified = config["stages"]["unified"] | {"steps": WARMUP + STEPS, "prompts_per_step": PROMPTS * ranks}
    config |= {
        "output_dir": str(folder),
        "threads": 1,
        "stages": {"unified": unified},
        "logging": {"tensorboard": False, "samples_every": 0},
        "evaluation": {"num_prompts": ranks, "scorer": None},
        "checkpoint": {"every": 0},
    }
    path = folder / "scaling.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [*LAUNCHER, "--nproc-per-node", str(ranks), "fastcorl/train.py", "--config", str(path), "--name"]
    running = [
        subprocess.Popen([*command, name], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for name in names
    ]
    assert all([process.wait() == 0 for process in running])
    records = zip(*(read_records(folder / name)[WARMUP:] for name in names), strict=True)
    for name in names:
        (folder / name).rename(folder / f"{name}-{len(list(folder.iterdir()))}")
    return [
        {"total": mean(record.step_seconds for record in together)}
        | {phase: mean(record.seconds[phase] for record in together) for phase in together[0].seconds}
        for together in records
    ]


def trained_parameters():
    from fastcorl.model import load_policy

    return sum(weight.numel() for _, weight in load_policy("quickstart").trained_parameters())


def all_reduce_seconds(count):
    """Median time in which two ranks add `count` float32 numbers."""
    command = [*LAUNCHER, "--nproc-per-node", "2", "-m", "bench.all_reduce", str(count)]
    done = subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
