"""Rows, images and data sets in the formats that users bring."""

import io
import json
from pathlib import Path

import datasets
from PIL import Image
from pyarrow import parquet

from fastcorl.data import Rows, Schema
from fastcorl.data.rows import Shards
from fastcorl.data.schema import Needs, resolve_columns


def png(size=(8, 6), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def row(**changes):
    return {
        "prompt": "a red three",
        "real_image": {"bytes": png(), "path": None},
        "qa_problem": "Which digit?",
        "qa_solution": "<think>red</think><answer>3</answer>",
        "qa_type": "OE",
    } | changes


def numbered(count: int, first: int = 0):
    """Rows whose captions tell them apart; types alternate."""
    return [row(prompt=f"caption {i}", qa_type=("MC", "OE")[i % 2]) for i in range(first, first + count)]


def in_memory(rows, needs: Needs | None = None, question_type: str | None = None) -> Rows:
    needs = needs or Needs()
    names = resolve_columns(rows[0], {}, needs, "data.train x:y", question_type=question_type)
    return Rows(rows, Schema("data.train x:y", names, needs, question_type))


def write_parquet(path: Path, rows) -> Path:
    """As `datasets` writes it; a row without one of the columns has a null there."""
    names = list(dict.fromkeys(name for each in rows for name in each))

    def feature(name):
        values = [each.get(name) for each in rows]
        if any(isinstance(value, dict) for value in values):
            return datasets.Image()
        return datasets.Value("float64" if any(isinstance(value, float) for value in values) else "string")

    features = datasets.Features({name: feature(name) for name in names})
    columns = {name: [each.get(name) for each in rows] for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    images = [each.get("real_image") for each in rows]
    if any(isinstance(image, dict) and image["bytes"] is None for image in images):
        parquet.write_table(table.data.table, path)  # to_parquet would follow the paths and put the files in
    else:
        table.to_parquet(str(path))
    return path


def write_jsonl(path: Path, rows) -> Path:
    """With each image as a file beside it. A row that is text is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, each in enumerate(rows):
        image = None if isinstance(each, str) else each["real_image"]
        if isinstance(image, dict) and image.keys() == {"bytes", "path"}:
            name = image["path"]
            if name is None:
                name = f"{path.stem}-{index}.png"
                (path.parent / name).write_bytes(image["bytes"])
            each = {**each, "real_image": name}
        lines.append(each if isinstance(each, str) else json.dumps(each))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_hub_layout(folder: Path, shards, split="train") -> Path:
    """A local folder as a data set's repository on the hub looks."""
    for index, rows in enumerate(shards):
        write_parquet(folder / "data" / f"{split}-{index:05d}-of-{len(shards):05d}.parquet", rows)
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
        f"  - split: {split}\n    path: data/{split}-*\n---\n# Data\n"
    )
    return folder


def captions(prompts) -> list[str]:
    return [prompt.caption for prompt in prompts]


def list_stream(*shards):
    """Shards that read rows from lists."""
    return Shards(tuple(lambda rows=rows: iter(rows) for rows in shards))
