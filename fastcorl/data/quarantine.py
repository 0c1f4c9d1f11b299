"""Bad rows are left out and listed, up to a limit."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from fastcorl.data.validation import BadRow
from fastcorl.errors import UserError

ROWS_BEFORE_VERDICT = 50


class Quarantine:
    """The bad rows of one source.

    More of them than the fraction `limit` of the rows looked at stop the run with a UserError that names the first; 0
    allows none. `key` is the configuration key of the limit. Rows count once, however often they are met.
    """

    def __init__(self, limit: float, key: str = "data.max_bad_fraction"):
        self.limit = limit
        self.key = key
        self.bad: dict[str, BadRow] = {}
        self._left_out: set[str] = set()
        self._seen: set[str] = set()
        self._looked_at = 0
        self._path: Path | None = None
        self._written: set[tuple[str, str]] = set()

    @property
    def left_out(self) -> frozenset[str]:
        """Ids of the bad rows found before the run. Prompt sources leave out these and no others: rows that are met
        later depend on where a run was resumed."""
        return frozenset(self._left_out)

    def record(self, bad: Iterable[BadRow], looked_at: int) -> None:
        """Take the bad ones of `looked_at` rows, all that are looked at before a run, and give the verdict."""
        self._looked_at = looked_at
        for row in bad:
            self._left_out.add(row.row)
            self._add(row)
        self._verdict(looked_at)

    def see(self, row_id: str, bad: BadRow | None) -> None:
        """Count a row that was looked at when it was taken, and give the verdict so far.

        It waits for 50 rows, and a single bad one never suffices, unless none is allowed.
        """
        self._seen.add(row_id)
        if bad is not None:
            self._add(bad)
        if self.limit == 0 or (len(self._seen) >= ROWS_BEFORE_VERDICT and len(self.bad) > 1):
            # Of rows looked at before the run those that are met are a part.
            self._verdict(max(len(self._seen), self._looked_at))

    def write_to(self, path: Path) -> None:
        """Append bad rows to `path`, one JSON object a line: those so far, and from now on each when it is found.

        What the file already lists is not listed again.
        """
        if path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                with suppress(ValueError):  # a killed run leaves half a line
                    listed = json.loads(line)
                    self._written.add((listed["source"], listed["row"]))
            if text and not text.endswith("\n"):
                path.write_text(text + "\n", encoding="utf-8")
        self._path = path
        for row in self.bad.values():
            self._write(row)

    def _add(self, row: BadRow) -> None:
        if row.row not in self.bad:
            self.bad[row.row] = row
            self._write(row)

    def _write(self, row: BadRow) -> None:
        if self._path is not None and (row.source, row.row) not in self._written:
            self._written.add((row.source, row.row))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def _verdict(self, looked_at: int) -> None:
        if len(self.bad) > self.limit * looked_at:
            first = next(iter(self.bad.values()))
            raise UserError(
                f"{first} ({len(self.bad)} of {looked_at} rows are bad, more than {self.key} {self.limit:g}; "
                f"mend them, or allow more)"
            )
