"""Every row is looked at before anything is trained, so that a bad one is not met in the night."""

import re
from collections.abc import Iterable
from typing import Any

from fastcorl.data.images import ImageError, decode_image
from fastcorl.data.rows import Rows
from fastcorl.errors import UserError

QUESTION_TYPES = ("MC", "OE")
_ANSWER = re.compile(r"<answer>.*?\S.*?</answer>", re.DOTALL)


def validate_rows(rows: Rows, indices: Iterable[int] | None = None) -> None:
    """Raise UserError for the first bad row, naming the source, the row and the column; images are decoded.

    `indices` limits the work, so that ranks can share it out.
    """
    for index in range(len(rows)) if indices is None else indices:
        row = rows[index]
        problem = _problem(row, rows)
        if problem:
            column, what = problem
            raise UserError(f"{rows.source}: row {index}: {rows.names[column]}: {what}")


def _problem(row: dict[str, Any], rows: Rows) -> tuple[str, str] | None:
    for column in ("prompt", "qa_problem", "qa_solution", "qa_type"):
        value = row[column]
        if not isinstance(value, str):
            return column, f"must be text, got {'nothing' if value is None else 'a ' + type(value).__name__}"
        if not value.strip():
            return column, "is empty"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return column, "is not valid Unicode"
    if row["qa_type"] not in QUESTION_TYPES:
        return "qa_type", f"must be one of {', '.join(QUESTION_TYPES)}, got {row['qa_type'][:40]!r}"
    if not _ANSWER.search(row["qa_solution"]):
        return "qa_solution", "has no <answer>...</answer> with something in it"
    try:
        decode_image(row["real_image"], rows.folder)
    except ImageError as error:
        return "real_image", str(error)
    return None
