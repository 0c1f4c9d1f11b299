"""Prompts of public drawing benchmarks, read from the files that each one publishes.

The formats are those of their own readers: GenEval's `generation/diffusers_generate.py` (djghosh13/geneval),
DPG-Bench's `dpg_bench/compute_dpg_bench.py` (TencentQQGYLab/ELLA), and WISE's `vllm_eval.py` and
`WISE_legacy/gpt_eval.py` (PKU-YuanGroup/WISE).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcorl.errors import UserError


@dataclass(frozen=True)
class DrawingTask:
    """A prompt to draw: `name` is that of its pictures, `place` where it was read, `metadata` what GenEval's scorer
    checks drawings against."""

    name: str
    prompt: str
    place: str
    metadata: dict[str, Any] | None = None


def read_tasks(layout: str, sources: Sequence[str | Path]) -> list[DrawingTask]:
    """The prompts of a benchmark, in the order of its files.

    Args:
        layout: "geneval", "dpg" or "wise".
        sources: GenEval: `evaluation_metadata.jsonl`, one file. DPG-Bench: the folder of its prompts, or `.txt` files.
            WISE: one or more of its JSON files.

    Raises UserError for a file or a prompt that the benchmark's own scorer could not use.
    """
    if layout not in READERS:
        raise UserError(f"--layout {layout}: must be one of {', '.join(READERS)}")
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise UserError(f"--prompts {path}: no such file or folder")
    tasks = list(READERS[layout](paths))
    if not tasks:
        raise UserError(f"--prompts {' '.join(map(str, paths))}: no prompts for {layout} in there")
    first: dict[str, str] = {}
    for task in tasks:
        if task.name in first:
            raise UserError(f"{task.place}: its pictures would be named {task.name}, as those of {first[task.name]}")
        first[task.name] = task.place
    return tasks


def _geneval(paths: Sequence[Path]) -> Iterator[DrawingTask]:
    """One JSON object per line; the number of a line is the name of its folder."""
    if len(paths) != 1:
        raise UserError(f"--prompts: GenEval has one file, evaluation_metadata.jsonl; {len(paths)} were given")
    # Not splitlines: a JSON string may hold other characters that it takes for the end of a line.
    for index, line in enumerate(_read(paths[0]).rstrip("\n").split("\n")):
        place = f"{paths[0]}: line {index + 1}"
        metadata = _json(line, place)
        if not isinstance(metadata, dict):
            raise UserError(f"{place}: must be a JSON object with prompt and tag")
        if not isinstance(metadata.get("tag"), str):
            raise UserError(f"{place}: tag, the group that GenEval scores it in, is missing")
        yield DrawingTask(f"{index:05d}", _prompt(metadata.get("prompt"), f"{place}: prompt"), place, metadata)


def _dpg(paths: Sequence[Path]) -> Iterator[DrawingTask]:
    """A text file per prompt; its name is that of the picture."""
    for path in paths:
        for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            if file.suffix != ".txt":
                raise UserError(f"{file}: a prompt of DPG-Bench is a file that ends in .txt")
            if "." in file.stem:
                raise UserError(f"{file}: DPG-Bench's scorer takes names up to the first dot: it must be before txt")
            yield DrawingTask(file.stem, _prompt(_read(file).strip(), str(file)), str(file))


def _wise(paths: Sequence[Path]) -> Iterator[DrawingTask]:
    """A JSON list of objects; `prompt_id` is the picture's name."""
    for path in paths:
        rows = _json(_read(path), str(path))
        if not isinstance(rows, list):
            raise UserError(f"{path}: must be a JSON list of objects with prompt_id and Prompt")
        for index, row in enumerate(rows):
            place = f"{path}: entry {index}"
            number = row.get("prompt_id") if isinstance(row, dict) else None
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise UserError(f"{place}: prompt_id must be a whole number, got {number!r}")
            yield DrawingTask(str(number), _prompt(row.get("Prompt"), f"{place}: Prompt"), place)


READERS: dict[str, Callable[[Sequence[Path]], Iterator[DrawingTask]]] = {
    "geneval": _geneval,
    "dpg": _dpg,
    "wise": _wise,
}


def _read(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"--prompts {path}: is a folder; only DPG-Bench's prompts are one")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as UTF-8 text: {error}") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: is no JSON: {error}") from error


def _prompt(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: must be a text that says what to draw, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: holds half of a surrogate pair, which is no text") from error
    return value
