"""Every kind of bad row, at the beginning, in the middle and at the end of a data set; prints one line of JSON.

    python -m tests.faults.count_bad_rows

First each kind alone: looked at before a run, met during it, and in a stream, from parquet and from jsonl. Then all
kinds in one data set that the shipped model trains three steps on: each must be left out and listed once, by its row,
and the run must have the steps, and each step the drawings, that it has without them.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fastcorl.data import MapPrompts, Quarantine, StreamPrompts, check_rows, load_rows, open_stream
from tests.data.bad_rows import ANYWHERE, JSONL_ONLY, lengths, make_folder
from tests.data.examples import numbered, row, write_jsonl, write_parquet
from tests.loop.launching import REPOSITORY, SMALL_RUN, environment, read_metrics

KINDS = ANYWHERE | JSONL_ONLY
GOOD = 8
PLACES = {"first": 0, "middle": GOOD // 2, "last": GOOD}
STEPS = 3
CAPTION = "a red three at top left"
LIMIT = 256
SMALL = f"""
extends: {SMALL_RUN}
output_dir: .
data: {{max_prompt_tokens: {LIMIT}, max_bad_fraction: 1, shuffle_buffer: 16}}
rollout: {{max_new_tokens: 8}}
checkpoint: {{every: 0}}
stages:
  unified: {{task: unified, steps: {STEPS}, prompts_per_step: 2}}
"""


def with_bad(changes: dict | str, place: int) -> list:
    bad = changes if isinstance(changes, str) else {**row(prompt="bad"), **changes}
    return [*numbered(place), bad, *numbered(GOOD - place, place)]


def expected(kind: str, place: int, limit: int) -> tuple[str, str]:
    """Column and words of a kind that stands in row `place`."""
    _, column, words = KINDS[kind]
    return column, words.replace("line 5", f"line {place + 1}").replace("is 1024", f"is {limit}")


def found_alone(kind: str, place: int, suffix: str, folder: Path) -> Counter[str]:
    """One bad row among good ones; which ways of reading find it, and it alone."""
    make_folder(folder / "data")
    write = write_parquet if suffix == "parquet" else write_jsonl
    path = str(write(folder / "data" / f"x.{suffix}", with_bad(KINDS[kind][0], place)))
    rows, column_and_words = load_rows(path), expected(kind, place, 1024)
    options = {"seed": 0, "stage": "s", "prompts_per_step": 3, "check_prompt": lengths()}
    met, streamed = Quarantine(0.2), Quarantine(0.2)
    sources = [
        MapPrompts(rows, quarantine=met, **options),
        StreamPrompts(open_stream(path), quarantine=streamed, shuffle_buffer=4, **options),
    ]
    taken = [[prompt.caption for step in (1, 2, 3) for prompt in each.take(step, 0, 1)] for each in sources]
    ways = {
        "before": check_rows(rows, check_prompt=lengths()),
        "when taken": list(met.bad.values()),
        "streamed": list(streamed.bad.values()),
    }
    passed: Counter[str] = Counter()
    for way, bad in ways.items():
        if [(each.row, each.column) for each in bad] == [(str(place), column_and_words[0])]:
            passed[way] = int(column_and_words[1] in bad[0].reason)
    whole = all(len(captions) == 9 and "bad" not in captions for captions in taken)
    return passed if whole else Counter()


def alone() -> dict[str, int]:
    """Cases and how many of them are found."""
    cases = found = 0
    for kind in KINDS:
        for place in PLACES.values():
            for suffix in ("parquet", "jsonl") if kind in ANYWHERE else ("jsonl",):
                with tempfile.TemporaryDirectory() as name:
                    passed = found_alone(kind, place, suffix, Path(name))
                cases += 3
                found += passed.total()
                if passed.total() < 3:
                    print(f"{kind}, row {place} of {suffix}: only {dict(passed)}", file=sys.stderr)
    return {"kinds": len(KINDS), "places": len(PLACES), "cases": cases, "found": found}


def good(index: int) -> dict[str, object]:
    """A row as the shipped model can take it; all have the column that the first of jsonl must have."""
    return row(prompt=CAPTION, qa_type=("MC", "OE")[index % 2], pair_similarity=1.0)


def in_one_run(suffix: str, *, streaming: bool) -> dict[str, object]:
    """A run on all kinds and as many good rows, each taken once where the rows are streamed."""
    kinds = list(ANYWHERE if suffix == "parquet" else KINDS)
    rows = []
    for index, kind in enumerate(kinds):
        changes = KINDS[kind][0]
        rows.append(changes if isinstance(changes, str) else {**good(index), **changes})
        rows.append(good(index))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.yaml").write_text(SMALL)
        make_folder(folder / "data")
        (write_parquet if suffix == "parquet" else write_jsonl)(folder / "data" / f"x.{suffix}", rows)
        options = [f"--data.train=data/x.{suffix}", f"--data.streaming={streaming}"]
        if streaming:  # all of the data in three steps
            options.append(f"--stages.unified.prompts_per_step={-(-len(rows) // STEPS)}")
        command = [sys.executable, str(REPOSITORY / "fastcorl" / "train.py"), "--config", "small.yaml", *options]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            return {"data": suffix, "streaming": streaming, "exit": done.returncode}
        metrics = read_metrics(folder / "run")
        listed = [json.loads(line) for line in (folder / "run" / "bad_rows.jsonl").read_text().splitlines()]
    right = 0
    for index, kind in enumerate(kinds):
        column, words = expected(kind, 2 * index, LIMIT)
        lines = [line for line in listed if line["row"] == str(2 * index)]
        if len(lines) == 1 and lines[0]["column"] == column and words in lines[0]["reason"]:
            right += 1
        else:
            print(f"{kind}, row {2 * index}: {lines}", file=sys.stderr)
    prompts = {line["images"] for line in metrics}
    return {
        "data": suffix,
        "streaming": streaming,
        "exit": done.returncode,
        "steps": len(metrics),
        "drawings_per_step": sorted(prompts),
        "kinds": len(kinds),
        "listed": len(listed),
        "right": right,
    }


def main() -> None:
    start = time.perf_counter()
    figures = alone()
    runs = [
        in_one_run("parquet", streaming=False),
        in_one_run("jsonl", streaming=False),
        in_one_run("parquet", streaming=True),
        in_one_run("jsonl", streaming=True),
    ]
    whole = all(
        run["exit"] == 0 and run["steps"] == STEPS and run["kinds"] == run["listed"] == run["right"] for run in runs
    )
    print(json.dumps({**figures, "runs": runs, "seconds": round(time.perf_counter() - start, 1)}))
    raise SystemExit(not whole or figures["found"] < figures["cases"])


if __name__ == "__main__":
    main()
