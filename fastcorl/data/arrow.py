"""`datasets` tables as plain rows. They are read as Arrow, so that `datasets` decodes nothing: it would follow any path
or address that a row names."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import datasets
import pyarrow

from fastcorl.data.rows import Shards
from fastcorl.data.schema import Unreadable
from fastcorl.errors import UserError

BATCH_ROWS = 16


class ArrowTable:
    """A `datasets.Dataset` whose rows are plain values; an image is its record of bytes and path."""

    def __init__(self, table: datasets.Dataset):
        self.table = table.with_format("arrow")

    @property
    def column_names(self) -> list[str]:
        return self.table.column_names

    def select(self, columns: Iterable[str]) -> "ArrowTable":
        """The same rows with these columns only, so that no other is ever read."""
        return ArrowTable(self.table.select_columns(list(dict.fromkeys(columns))))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, key: int | str) -> Any:
        """A row as a dict, or the values of a column."""
        if isinstance(key, str):
            return self.table.select_columns([key])[:].column(key).to_pylist()
        return self.table[key].to_pylist()[0]


def shards_of(table: datasets.Dataset | datasets.IterableDataset, place: str) -> Shards:
    """The shards of a table; `place` begins the error of one that cannot be read to its end."""
    count = table.num_shards if isinstance(table, datasets.IterableDataset) else 1
    parts = [table.shard(num_shards=count, index=index) for index in range(count)] if count > 1 else [table]
    return Shards(tuple(partial(_read, part, place) for part in parts))


def _read(table: datasets.Dataset | datasets.IterableDataset, place: str) -> Iterator[Any]:
    count = 0
    batches = iter(table.with_format("arrow").iter(batch_size=BATCH_ROWS))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # a broken file or connection: pyarrow's, fsspec's and the library's own errors
            text = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(f"{place}: cannot be read beyond row {count}: {text}") from error
        if batch is None:
            return
        yield from _plain_rows(batch)
        count += batch.num_rows


def _plain_rows(batch: pyarrow.Table) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [Unreadable(f"is not valid Unicode: {error}")]
        return [row for index in range(batch.num_rows) for row in _plain_rows(batch.slice(index, 1))]
