"""Rows of a source under our column names: by index, or one after another."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcorl.data.schema import Schema, Unreadable
from fastcorl.errors import UserError

Row = dict[str, Any] | Unreadable


class Rows(Sequence[Row]):
    """Rows that can be had by index. A row's id is its index as text."""

    def __init__(self, table: Any, schema: Schema):
        self.table = table
        self.schema = schema

    @property
    def source(self) -> str:
        return self.schema.source

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source}: row {index} of {len(self)}")
        return self.schema.row(self._raw(index))

    def numbered(self, indices: Iterable[int] | None = None) -> Iterator[tuple[str, Row]]:
        """Ids and rows, of all rows or of those at `indices`."""
        for index in range(len(self)) if indices is None else indices:
            yield str(index), self[index]

    def column(self, name: str) -> list[Any]:
        """One of our columns, without touching the others where the table allows it; None for a row without it."""
        if name not in self.schema.names:
            return [self.schema.question_type if name == "qa_type" else None] * len(self)
        if hasattr(self.table, "column_names"):
            try:
                return list(self.table[self.schema.names[name]])
            except UnicodeDecodeError:  # somewhere in the column; row by row the others can still be read
                pass
        return [None if isinstance(row, Unreadable) else row.get(name) for _, row in self.numbered()]

    def _raw(self, index: int) -> Any:
        try:
            return self.table[index]
        except UnicodeDecodeError as error:
            return Unreadable(f"is not valid Unicode: {error}")


@dataclass(frozen=True)
class Shards:
    """Functions that read one shard each from its beginning; `columns` are those wanted, None for all."""

    readers: tuple[Callable[[], Iterator[Any]], ...]
    columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.readers)

    def read(self, shard: int) -> Iterator[Any]:
        """The raw rows of a shard, in their order."""
        for row in self.readers[shard]():
            if self.columns is None or not isinstance(row, dict):
                yield row
            else:
                yield {name: row[name] for name in self.columns if name in row}

    def narrowed(self, columns: Iterable[str]) -> "Shards":
        return Shards(self.readers, tuple(columns))


@dataclass(frozen=True)
class RowStream:
    """Rows one after another. A row's id is `shard/number`, or its number where there is one shard."""

    shards: Shards
    schema: Schema

    @property
    def source(self) -> str:
        return self.schema.source

    def numbered(self, shards: Iterable[int] | None = None) -> Iterator[tuple[str, Row]]:
        """Ids and rows, of all shards or of `shards` in that order."""
        for shard in range(len(self.shards)) if shards is None else shards:
            prefix = f"{shard}/" if len(self.shards) > 1 else ""
            for number, raw in enumerate(self.shards.read(shard)):
                yield f"{prefix}{number}", self.schema.row(raw)


def column_names(sample: Sequence[Any], source: str) -> list[str]:
    """The columns that any row of `sample` has; raises UserError where none is a mapping."""
    names = [name for row in sample if isinstance(row, Mapping) for name in row]
    if not names:
        first = sample[0]
        reason = first.reason if isinstance(first, Unreadable) else f"got a {type(first).__name__}"
        raise UserError(f"{source}: row 0: must be a mapping of columns: {reason}")
    return names
