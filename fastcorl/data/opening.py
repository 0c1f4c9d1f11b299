"""What a source's text stands for: a function, local files, or a data set of the hub."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from fastcorl.data.files import Files, find_files, read_text_rows
from fastcorl.data.hub import cache_folder, load_hub
from fastcorl.data.rows import Shards
from fastcorl.errors import UserError
from fastcorl.places import hub_data
from fastcorl.plugins import is_spec, load_object


@dataclass(frozen=True)
class Opened:
    """`table` is a `datasets` table, `Shards`, or what a user's function returned. `columns` are renames that the kind
    of source implies; `folder` and `absolute` are as in `Schema`."""

    table: Any
    folder: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    absolute: bool = False


def open_source(
    source: str, key: str, *, split: str | None, revision: str | None, subset: str | None, streaming: bool
) -> Opened:
    """Open `source`; raises UserError where it cannot be. A text file is read whole unless `streaming`."""
    place = f"{key} {source}"
    path, own_split = _split_off(source)
    if is_spec(source) and not Path(path).exists():
        return _open_function(source, key, streaming)
    files = find_files(path, place, own_split or split)
    if files is not None:
        return _open_files(files, place, own_split or split, subset, streaming)
    name, hub_split = hub_data(source, place)
    table = load_hub(name, place, split=hub_split or split, revision=revision, subset=subset, streaming=streaming)
    return Opened(table, cache_folder(), absolute=True)


def _split_off(source: str) -> tuple[str, str | None]:
    """A local folder and the split asked of it, in `folder:split`."""
    path, colon, split = source.partition(":")
    if colon and not Path(source).exists() and Path(path).is_dir():
        return path, split
    return source, None


def _open_function(spec: str, key: str, streaming: bool) -> Opened:
    function = load_object(spec, key)
    place = f"{key} {spec}"
    if not callable(function):
        raise UserError(f"{place}: is not a function")
    table = function()
    if isinstance(table, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError(f"{place}: holds the splits {', '.join(map(str, table))}; return one of them")
    no_rows = (str, bytes, Mapping, datasets.Dataset, datasets.IterableDataset)  # or such as bring their own shards
    if streaming and isinstance(table, Iterable) and not isinstance(table, no_rows):
        return Opened(Shards((lambda: iter(function()),)))
    return Opened(table)


def _open_files(files: Files, place: str, split: str | None, subset: str | None, streaming: bool) -> Opened:
    names = [str(path) for path in files.paths]
    if files.kind == "hub":
        table = load_hub(names[0], place, split=split, revision=None, subset=subset, streaming=streaming)
        return Opened(table, files.folder)
    if files.kind == "saved":
        return Opened(_read_saved(names[0], place, split), files.folder)
    if files.kind == "parquet":
        return Opened(_read_parquet(names, place, streaming), files.folder)
    readers = tuple(partial(read_text_rows, path, files.kind, place) for path in files.paths)
    table = Shards(readers) if streaming else list(chain.from_iterable(reader() for reader in readers))
    return Opened(table, files.folder, {"real_image": "file_name"} if files.images else {})


def _read_parquet(names: list[str], place: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is told in the error's line
    try:
        if streaming:
            return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        return datasets.Dataset.from_parquet(names)
    except Exception as error:  # pyarrow's and the library's own, without a common base
        cause = str(error.__cause__ or error).rstrip(".")
        raise UserError(f"{place}: not a readable parquet file, copy or write it again: {cause}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _read_saved(name: str, place: str, split: str | None) -> datasets.Dataset:
    try:
        table = datasets.load_from_disk(name)
    except Exception as error:  # as above
        raise UserError(f"{place}: not a folder of datasets.save_to_disk: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserError(f"{place}: holds the splits {', '.join(map(str, table))}; give one of them")
        return table[split]
    return table
