"""Local files: which of them a source names, and the rows of those that are text."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastcorl.data.schema import Unreadable
from fastcorl.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "json"}
_WHAT = (
    "must be .parquet, .jsonl, .json, or a folder: of such files, of images with metadata.jsonl or metadata.csv, "
    "of datasets.save_to_disk, or laid out as on the hub"
)


@dataclass(frozen=True)
class Files:
    """Files of one kind. Paths of images in them are relative to `folder`; `images` are listed in their own column
    file_name; "saved" and "hub" are folders."""

    kind: Literal["parquet", "jsonl", "json", "csv", "saved", "hub"]
    paths: tuple[Path, ...]
    folder: Path
    images: bool = False


def find_files(source: str, place: str, split: str | None = None) -> Files | None:
    """What the file, folder or pattern `source` holds, or None where nothing has that path.

    `place` begins errors. `split` is the subfolder that a folder of images may have for it.
    """
    path = Path(source)
    if path.is_dir():
        return _find_in_folder(path, place, split)
    if path.exists():
        return _of_kind([path], path.parent, place)
    if glob.has_magic(source):
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if os.path.isfile(name)]
        if not paths:
            raise UserError(f"{place}: no file matches")
        return _of_kind(paths, Path(os.path.commonpath([each.parent for each in paths])), place)
    return None


def _find_in_folder(folder: Path, place: str, split: str | None) -> Files:
    for within in (folder, *([folder / split] if split else [])):
        for name in METADATA:
            if (within / name).is_file():
                return _of_kind([within / name], within, place)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Files("saved", (folder,), folder)
    if not (folder / "README.md").is_file():
        for suffix in (".parquet", ".jsonl"):
            paths = _of_split(sorted(folder.glob(f"*{suffix}")), split, place)
            if paths:
                return _of_kind(paths, folder, place)
    if any(next(folder.rglob(f"*{suffix}"), None) for suffix in SUFFIXES):
        return Files("hub", (folder,), folder)
    raise UserError(f"{place}: not a folder of datasets.save_to_disk, and nothing else that is known: {_WHAT}")


def _of_split(paths: list[Path], split: str | None, place: str) -> list[Path]:
    """The files of `split`, where some of their names begin with that of a split; else all of them."""
    named = {path: next((word for word in SPLITS if re.match(rf"{word}(?![a-z])", path.stem)), None) for path in paths}
    if not any(named.values()):
        return paths
    chosen = [path for path, word in named.items() if word == (split or "train") or path.stem == split]
    if not chosen:
        found = ", ".join(sorted({word for word in named.values() if word}))
        raise UserError(f"{place}: holds files of the splits {found}, and none of {split or 'train'}; give one of them")
    return chosen


def _of_kind(paths: list[Path], folder: Path, place: str) -> Files:
    if len(paths) == 1 and paths[0].name in METADATA:
        return Files("csv" if paths[0].suffix == ".csv" else "jsonl", tuple(paths), folder, images=True)
    suffixes = {path.suffix for path in paths}
    if len(suffixes) > 1:
        raise UserError(f"{place}: files of several kinds ({', '.join(sorted(suffixes))}); name one kind")
    suffix = suffixes.pop()
    if suffix not in SUFFIXES:
        raise UserError(f"{place}: {_WHAT}")
    return Files(SUFFIXES[suffix], tuple(paths), folder)


def read_text_rows(path: Path, kind: str, place: str) -> Iterator[Any]:
    """The rows of a jsonl, json or csv file; a line that cannot be read comes as `Unreadable`."""
    readers = {"jsonl": _json_lines, "json": _json_list, "csv": _csv_lines}
    try:
        yield from readers[kind](path, place)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{place}: {path}: {error}") from None


def _json_lines(path: Path, place: str) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row_of_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number)


def _row_of_json(line: bytes, number: int) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Unreadable(f"line {number} is not valid JSON: {error}")
    return row if isinstance(row, dict) else Unreadable(f"must be a mapping of columns, got a {type(row).__name__}")


def _json_list(path: Path, place: str) -> Iterator[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {path}: not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{place}: {path}: must be a list of rows")
    for row in rows:
        yield row if isinstance(row, dict) else Unreadable(f"must be a mapping of columns, got a {type(row).__name__}")


def _csv_lines(path: Path, place: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines, strict=True):
            yield Unreadable("has more cells than the header has names") if None in row else row
