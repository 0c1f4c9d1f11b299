"""Rows from a `module:function` or a local file, under our column names.

Images stay encoded until they are used, and `datasets` never decodes them, since it would follow any path or address.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcorl.config import COLUMNS
from fastcorl.errors import UserError
from fastcorl.plugins import is_spec, load_object


class Rows(Sequence[dict[str, Any]]):
    """Rows with our columns. `source` names them in errors; `folder` is what paths of images are relative to."""

    def __init__(self, table: Any, source: str, columns: Mapping[str, str], folder: Path | None = None):
        self.table = table
        self.source = source
        self.folder = folder
        self.names = {ours: columns.get(ours, ours) for ours in COLUMNS}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source}: row {index} of {len(self)}")
        row = self.table[index]
        missing = [theirs for theirs in self.names.values() if theirs not in row]
        if missing:
            raise UserError(
                f"{self.source}: row {index}: no column {missing[0]!r} (found: {', '.join(map(str, row))}); "
                f"name yours in data.columns"
            )
        return {ours: row[theirs] for ours, theirs in self.names.items()}

    def column(self, name: str) -> list[Any]:
        """One of our columns, without touching the others where the table allows it."""
        if hasattr(self.table, "column_names"):
            return list(self.table[self.names[name]])
        return [self[index][name] for index in range(len(self))]


def load_rows(source: str, columns: Mapping[str, str] | None = None, key: str = "data.train") -> Rows:
    """The rows that `source` names, with `columns` mapping our column names to theirs.

    `source` is `module:function`, called without arguments, or a .parquet, .jsonl or .json file, or a folder written
    by `datasets.save_to_disk`. Paths of images in files are relative to the file's folder. `key` is the configuration
    key that errors point to.
    """
    path = Path(source)
    if is_spec(source) and not path.exists():
        rows = Rows(_call(source, key), f"{key} {source}", columns or {})
    elif not path.exists():
        raise UserError(f"{key}: {source}: no such file or folder, and not of the form module:function")
    else:
        folder = path if path.is_dir() else path.parent
        rows = Rows(_read(path, key), f"{key} {source}", columns or {}, folder)
    if len(rows) == 0:
        raise UserError(f"{rows.source}: has no rows")
    _check_column_names(rows)
    return rows


def _call(spec: str, key: str) -> Sequence[Mapping[str, Any]]:
    function = load_object(spec, key)
    if not callable(function):
        raise UserError(f"{key}: {spec} is not a function")
    table = function()
    if isinstance(table, str | bytes) or not (hasattr(table, "__len__") and hasattr(table, "__getitem__")):
        raise UserError(f"{key}: {spec} returned a {type(table).__name__}, not a sequence of rows")
    if type(table).__module__.startswith("datasets."):
        return _undecoded(table, f"{key}: {spec}")
    return table


def _read(path: Path, key: str) -> Any:
    if path.is_dir():
        return _read_saved(path, key)
    if path.suffix == ".parquet":
        return _read_parquet(path, key)
    if path.suffix in (".jsonl", ".json"):
        return _read_json(path, key)
    raise UserError(f"{key}: {path}: must be .parquet, .jsonl, .json or a folder of datasets.save_to_disk")


def _read_parquet(path: Path, key: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow's and the library's own, without a common base
        raise UserError(f"{key}: {path}: not a readable parquet file: {error.__cause__ or error}") from error
    return _undecoded(table, f"{key}: {path}")


def _read_saved(path: Path, key: str) -> Any:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise UserError(f"{key}: {path}: not a folder of datasets.save_to_disk: {error}") from error
    return _undecoded(table, f"{key}: {path}")


def _undecoded(table: Any, place: str) -> Any:
    import datasets

    if isinstance(table, datasets.DatasetDict):
        raise UserError(f"{place}: holds the splits {', '.join(map(str, table))}; give one of them")
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"{place}: a {type(table).__name__} has no fixed rows; save it with save_to_disk first")
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _read_json(path: Path, key: str) -> list[dict[str, Any]]:
    """Read whole: such rows are text, and errors can name the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path}: {error}") from None
    if path.suffix == ".json":
        rows = _parse(text, f"{key}: {path}")
        if not isinstance(rows, list):
            raise UserError(f"{key}: {path}: must be a list of rows")
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, f"{key}: {path}: line {number}") for number, line in lines if line.strip()]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{key}: {path}: row {index}: must be a mapping of columns")
    return rows


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None


def _check_column_names(rows: Rows) -> None:
    first = rows.table[0]
    if not isinstance(first, Mapping):
        raise UserError(f"{rows.source}: row 0: must be a mapping of columns, got a {type(first).__name__}")
    for ours, theirs in rows.names.items():
        if theirs not in first:
            raise UserError(
                f"{rows.source}: no column {theirs!r} (found: {', '.join(map(str, first))}); "
                f"name yours in data.columns, as in --data.columns {ours} {next(iter(first), 'name')}"
            )
