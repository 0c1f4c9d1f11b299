"""Small stand-ins of CoRL's four data sets: parquet files with images in them, laid out as on the hub."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from fastcorl.rehearsal.scenes import ask, caption, draw, make_scene

NUM_ROWS = 48
# Which type of question row `index` of `count` has. The public x2x sets have all of one type first.
QUESTION_TYPES: dict[str, Callable[[int, int], str]] = {
    "x2x_rft_22k": lambda index, count: "OE" if 2 * index < count else "MC",
    "x2x_rft_16k": lambda index, count: "OE" if 2 * index < count else "MC",
    "mcot_r1_mcq_66k": lambda index, count: "MC",
    "mcot_r1_vqa_66k": lambda index, count: "OE",
}
FEATURES = datasets.Features(
    {
        "idx": datasets.Value("int64"),
        "prompt": datasets.Value("string"),
        "real_image": datasets.Image(),
        "qa_problem": datasets.Value("string"),
        "qa_solution": datasets.Value("string"),
        "qa_type": datasets.Value("string"),
    }
)


def make_rows(name: str, seed: int, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows of the data set `name`; `real_image` is a JPEG file as `datasets` keeps it."""
    rows = []
    for index in range(count):
        rng = random.Random(f"{seed}/{name}/{index}")
        scene = make_scene(rng)
        kind = QUESTION_TYPES[name](index, count)
        question = ask(scene, rng, kind)
        rows.append(
            {
                "idx": index,
                "prompt": caption(scene, rng),
                "real_image": {"bytes": draw(scene, rng), "path": f"{index:012d}.jpg"},
                "qa_problem": question.problem,
                "qa_solution": question.solution,
                "qa_type": kind,
            }
        )
    return rows


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """One shard of the split "train", as `push_to_hub` names it."""
    folder = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "train-00000-of-00001.parquet")
