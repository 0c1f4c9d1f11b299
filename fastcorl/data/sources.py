"""From the text a user names a data set by to its rows.

A source is `module:function`, a local file, a folder or a pattern of files, or `owner/name` (or `owner/name:split`) of
the Hugging Face hub; which of them is decided in this order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from fastcorl.data.arrow import ArrowTable, shards_of
from fastcorl.data.catalog import public_data
from fastcorl.data.opening import Opened, open_source
from fastcorl.data.rows import Rows, RowStream, Shards, column_names
from fastcorl.data.schema import Needs, Schema, resolve_columns
from fastcorl.errors import UserError

SAMPLE_ROWS = 16  # of a source without fixed columns; what none of them has counts as absent


@dataclass(frozen=True)
class Source:
    """A data set as the user names it, and what it is for.

    `columns` renames ours to theirs. `question_type` is that of rows without qa_type, where the public data sets do not
    say it. `split`, `revision` and `subset` are those of the hub. `key` is the configuration key that errors point to.
    """

    name: str
    columns: Mapping[str, str]
    key: str = "data.train"
    needs: Needs = Needs()
    question_type: str | None = None
    split: str | None = None
    revision: str | None = None
    subset: str | None = None

    @property
    def place(self) -> str:
        return f"{self.key} {self.name}"

    def open(self, *, streaming: bool) -> Opened:
        return open_source(
            self.name,
            self.key,
            split=self.split,
            revision=self.revision,
            subset=self.subset,
            streaming=streaming,
        )

    def schema(self, found: Iterable[str], opened: Opened) -> Schema:
        """How rows with the columns `found` become ours."""
        public = public_data(self.name)
        question_type = (public and public.question_type) or self.question_type
        names = resolve_columns(
            found,
            {**opened.columns, **self.columns},
            self.needs,
            self.place,
            question_type=question_type,
            aliases=public is not None,
        )
        return Schema(self.place, names, self.needs, question_type, opened.folder, opened.absolute)


def load_rows(source: str, columns: Mapping[str, str] | None = None, key: str = "data.train", **options: Any) -> Rows:
    """The rows that `source` names, by index; `options` are the further fields of `Source`.

    Raises UserError for a source that cannot be read, has no rows, or lacks a column that is needed.
    """
    wanted = Source(source, columns or {}, key, **options)
    opened = wanted.open(streaming=False)
    table = opened.table
    if isinstance(table, datasets.IterableDataset):
        raise UserError(f"{wanted.place}: an IterableDataset has no fixed rows; set data.streaming to true")
    if isinstance(table, datasets.Dataset):
        table = ArrowTable(table)
    if isinstance(table, str | bytes | Mapping) or not (hasattr(table, "__len__") and hasattr(table, "__getitem__")):
        raise UserError(f"{wanted.place}: returned a {type(table).__name__}, not a sequence of rows")
    if len(table) == 0:
        raise UserError(f"{wanted.place}: has no rows")
    if isinstance(table, ArrowTable):
        schema = wanted.schema(table.column_names, opened)
        return Rows(table.select(schema.names.values()), schema)
    sample = [table[index] for index in range(min(len(table), SAMPLE_ROWS))]
    return Rows(table, wanted.schema(column_names(sample, wanted.place), opened))


def open_stream(
    source: str, columns: Mapping[str, str] | None = None, key: str = "data.train", **options: Any
) -> RowStream:
    """The rows that `source` names, one after another and without keeping them; else as `load_rows`."""
    wanted = Source(source, columns or {}, key, **options)
    opened = wanted.open(streaming=True)
    table = opened.table
    if isinstance(table, datasets.Dataset | datasets.IterableDataset):
        shards = shards_of(table, wanted.place)
    elif isinstance(table, Shards):
        shards = table
    else:
        raise UserError(f"{wanted.place}: returned a {type(table).__name__}, not rows")
    sample = [row for row, _ in zip(shards.read(0), range(SAMPLE_ROWS), strict=False)]
    if not sample:
        raise UserError(f"{wanted.place}: has no rows")
    schema = wanted.schema(column_names(sample, wanted.place), opened)
    return RowStream(shards.narrowed(schema.names.values()), schema)
