"""Which columns of a source are ours, and a raw row under our names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcorl.config_data import COLUMNS, OPTIONAL_COLUMNS
from fastcorl.data.catalog import ALIASES
from fastcorl.errors import UserError


@dataclass(frozen=True)
class Needs:
    """What the rows are for. Drawing needs a caption and the real image, answering the image, question and solution."""

    draw: bool = True
    answer: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        drawing = ("prompt", "real_image") if self.draw else ()
        answering = ("real_image", "qa_problem", "qa_solution", "qa_type") if self.answer else ()
        return tuple(name for name in COLUMNS if name in drawing + answering)

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(self.draw or other.draw, self.answer or other.answer)


@dataclass(frozen=True)
class Unreadable:
    """Stands in a table for a row that could not be read, and says why."""

    reason: str


@dataclass(frozen=True)
class Schema:
    """How a source's rows become ours.

    `source` names it in errors; `names` are the columns it has, ours to theirs; `question_type` stands for an absent
    qa_type; `folder` is what paths of images are relative to, and `absolute` allows full paths inside it.
    """

    source: str
    names: Mapping[str, str]
    needs: Needs = Needs()
    question_type: str | None = None
    folder: Path | None = None
    absolute: bool = False

    def row(self, raw: Any) -> dict[str, Any] | Unreadable:
        """`raw` under our names; a column that is absent or empty and not needed gets its default."""
        if isinstance(raw, Unreadable):
            return raw
        if not isinstance(raw, Mapping):
            return Unreadable(f"must be a mapping of columns, got a {type(raw).__name__}")
        row = {ours: raw.get(theirs) for ours, theirs in self.names.items()}
        if "qa_type" not in self.names:
            row["qa_type"] = self.question_type
        return row

    def their(self, ours: str) -> str:
        """The source's name of our column, for errors."""
        return self.names.get(ours, ours)


def resolve_columns(
    found: Iterable[str],
    columns: Mapping[str, str],
    needs: Needs,
    source: str,
    *,
    question_type: str | None = None,
    aliases: bool = False,
) -> dict[str, str]:
    """Our columns that a source has, ours to theirs.

    `found` are the source's columns and `columns` the user's renames. With `aliases`, the names that the public data
    sets may use are tried too. Raises UserError where a column that `needs` asks for is not there.
    """
    found = list(dict.fromkeys(found))
    names = {}
    for ours in (*COLUMNS, *OPTIONAL_COLUMNS):
        wanted = [columns[ours]] if ours in columns else [ours, *(ALIASES.get(ours, ()) if aliases else ())]
        theirs = next((name for name in wanted if name in found), None)
        if theirs is not None:
            names[ours] = theirs
        elif ours in columns or (ours in needs.columns and not (ours == "qa_type" and question_type)):
            nearest = next((name for name in (ours, *ALIASES.get(ours, ())) if name in found), None)
            example = nearest or next(iter(found), "name")
            listed = ", ".join(map(str, found[:20])) + (", .." if len(found) > 20 else "")
            raise UserError(
                f"{source}: no column {' or '.join(map(repr, wanted))} (found: {listed}); "
                f"name yours in data.columns, as in --data.columns {ours} {example}"
            )
    return names
