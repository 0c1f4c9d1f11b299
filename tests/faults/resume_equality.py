"""N steps against K steps, kill -9, `--resume auto` and the rest, bit for bit; prints a line of JSON per case.

    python -m tests.faults.resume_equality [CASE ..]

Each case trains two stages twice: in one go, and killed at several places, each time resumed. Compared are what every
rank sampled, the rewards, advantages and weights of every step, also of those that are taken again, metrics.jsonl but
for what is measured of the machine, held-out scores, exports, and the last checkpoint. Exit code 1 if a bit differs.
"""

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.run_states import Comparison, compare_runs, read_steps
from tests.loop.launching import REPOSITORY, SMALL_RUN, environment

SMALL = f"""
extends: {SMALL_RUN}
optimizer: {{warmup_steps: 3, schedule: cosine, learning_rate: 1e-3}}
packing: {{tokens: 600}}
evaluation: {{num_prompts: 4, every: 2, scorer: fastcorl.quickstart.scorer:Scorer}}
checkpoint: {{every: 2}}
stages:
  unified: {{task: unified, steps: 5, prompts_per_step: 4}}
  t2i: {{task: t2i, init: unified, steps: 4, prompts_per_step: 4, beta: 0.1}}
"""
# Inside a stage; in an evaluation inside it; after its export and before its scores; inside the second stage. See
# `recorded_run`.
DEATHS = ("train unified 4", "evaluation unified 4", "evaluation unified 5", "rollout t2i 4")


class Case(NamedTuple):
    options: Sequence[str] = ()
    ranks: int = 0  # under the deepspeed launcher; 0 is plain python
    deaths: Sequence[str] = DEATHS


def zero(stage: int, ranks: int) -> Case:
    return Case((f"--deepspeed.zero_stage={stage}",), ranks)


CASES = {
    # Also while the first checkpoint is saved, and after the first stage's scores.
    "plain": Case((), deaths=("save unified 2", *DEATHS[:3], "rollout t2i 1", "save t2i 4")),
    "plain lora": Case(("--model.lora.rank=4", "--model.lora.targets", "q_proj", "down_proj")),
    "plain bfloat16": Case(("--model.dtype=bfloat16",)),
    "plain user reward": Case(("--rewards.extra", "tests.faults.noisy_reward:noisy", "0.5")),
    "plain streaming": Case(
        (
            "--data.train=rows.parquet",
            "--data.streaming=true",
            "--data.shuffle_buffer=8",
            "--data.held_out=None",
            "--data.held_out_rows=4",
            "--data.max_bad_fraction=0.5",
            "--stages.unified.prompts_per_step=6",
        ),
        deaths=(*DEATHS[:3], "train t2i 3"),
    ),
    "plain options": Case(
        (
            "--rollout.guidance=3",
            "--rollout.overlap=on",
            "--rewards.tim=frozen",
            "--algorithm.external=true",
            "--algorithm.num_iterations=2",
            "--algorithm.dynamic_sampling=1",
            "--algorithm.loss_type=dapo",
            "--algorithm.token_budget=64",
            "--algorithm.eps_low=0.2",
            "--algorithm.eps_high=0.2",
            "--algorithm.old_log_probs=sampled",
            "--algorithm.reference=swap",
        )
    ),
    "zero 1, 1 rank": zero(1, 1),
    "zero 3, 1 rank": zero(3, 1),
    **{f"zero {stage}, 2 ranks": zero(stage, 2) for stage in (0, 1, 2, 3)},
}


def launch(folder: Path, case: Case, death: str, *options: str) -> tuple[int, str]:
    """The run of a case in `folder`, its processes a group of their own; exit code and output once all are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(SMALL)
    command = [sys.executable]
    if case.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            command = ["deepspeed", "--num_gpus", str(case.ranks), "--master_port", str(probe.getsockname()[1])]
    process = subprocess.Popen(
        [
            *command,
            str(REPOSITORY / "tests" / "faults" / "recorded_run.py"),
            "--config=small.yaml",
            f"--output_dir={folder}",
            *case.options,
            *options,
        ],
        cwd=folder,
        env=environment() | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "RECORD": ".", "DEATH": death},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def finished(folder: Path, case: Case, *options: str) -> None:
    """Run a case to its end."""
    code, output = launch(folder, case, "", *options)
    if code:
        sys.exit(f"{' '.join(case.options)} ended with {code}:\n{output}")


def compare_steps(found: Comparison, one: Path, other: Path, ranks: int) -> int:
    """Hold each step of `other`, also those taken more than once, against that of `one`; their number."""
    count = 0
    for rank in range(max(1, ranks)):
        steps = {(line["stage"], line["step"]): line for line in read_steps(one, rank)}
        lines = read_steps(other, rank)
        found.see(sorted(steps), sorted({(line["stage"], line["step"]) for line in lines}), f"steps of rank {rank}")
        for line in lines:
            place = line["stage"], line["step"]
            found.see(steps[place], line, f"rank {rank} {line['stage']} {line['step']}")
        count += len(lines)
    return count


def write_rows(path: Path) -> None:
    """A data set smaller than a stage takes in all, one of its rows bad."""
    from datasets import Dataset, Image

    from fastcorl.quickstart.data import train

    rows = Dataset.from_list([dict(train()[index]) for index in range(24)]).cast_column("real_image", Image())
    table = rows.cast_column("real_image", Image(decode=False)).to_list()
    table[17]["real_image"]["bytes"] = table[17]["real_image"]["bytes"][:40]
    Dataset.from_list(table).to_parquet(path)


def try_case(name: str, case: Case, folder: Path) -> dict:
    start = time.perf_counter()
    whole, killed = folder / "whole", folder / "killed"
    for each in (whole, killed):
        each.mkdir()
        if "--data.train=rows.parquet" in case.options:
            write_rows(each / "rows.parquet")
    finished(whole, case)
    for number, death in enumerate(case.deaths):
        code, output = launch(killed, case, death, *(["--resume=auto"] if number else []))
        if code != -signal.SIGKILL:
            sys.exit(f"{name}: {death} ended with {code}:\n{output}")
    finished(killed, case, "--resume=auto")
    found = compare_runs(whole / "run", killed / "run")
    steps = compare_steps(found, whole, killed, case.ranks)
    lines = [line for rank in range(max(1, case.ranks)) for line in read_steps(whole, rank)]
    return {
        "case": name,
        "kills": case.deaths,
        "steps": steps,
        "taken_again": steps - len(lines),
        "sampled_tokens": sum(line["sampled"] for line in lines),
        "tensors": found.tensors,
        "values": found.values,
        "differing_bits": found.differing_bits,
        "differences": found.differences[:20],
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"all unless given: {'; '.join(CASES)}")
    names = parser.parse_args().cases or list(CASES)
    same = True
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            told = try_case(name, CASES[name], Path(folder))
        print(json.dumps(told), flush=True)
        same = same and not told["differences"]
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
