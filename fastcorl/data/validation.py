"""A row as a prompt, or what is wrong with it. No row is trusted: text, types, image and path are looked at."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastcorl.answer_tags import extract_answer
from fastcorl.config_data import QUESTION_TYPES
from fastcorl.data.images import ImageError, decode_image
from fastcorl.data.rows import Row, Rows
from fastcorl.data.schema import Schema, Unreadable
from fastcorl.records import Prompt

_TEXT = ("prompt", "qa_problem", "qa_solution", "qa_type")
PromptCheck = Callable[[Prompt], tuple[str, str] | None]
"""What the model cannot take of a prompt, as (column, reason): too many tokens, a placeholder in the text."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out. `row` is its id in the source, `column` the source's name of the column, or "row"."""

    source: str
    row: str
    column: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: row {self.row}: {self.column}: {self.reason}"


class _RowError(ValueError):
    """A column of ours, and what is wrong with it."""

    def __init__(self, column: str, reason: str):
        super().__init__(reason)
        self.column = column


def read_prompt(row_id: str, row: Row, schema: Schema, check_prompt: PromptCheck | None = None) -> Prompt | BadRow:
    """The row as a prompt, its image decoded; or as a bad row, told by the first thing that is wrong."""
    if isinstance(row, Unreadable):
        return BadRow(schema.source, row_id, "row", row.reason)
    try:
        prompt = _prompt(row_id, row, schema)
    except _RowError as error:
        return BadRow(schema.source, row_id, schema.their(error.column), str(error))
    problem = check_prompt(prompt) if check_prompt else None
    if problem:
        return BadRow(schema.source, row_id, schema.their(problem[0]), problem[1])
    return prompt


def examine(
    rows: Iterable[tuple[str, Row]], schema: Schema, check_prompt: PromptCheck | None = None, threads: int | None = None
) -> Iterator[Prompt | BadRow]:
    """`read_prompt` of every row, in order. Images are decoded in `threads` (None: one per core, at most 16).

    Rows are read and prompts checked by the calling thread alone; a few rows are decoded ahead of what is taken.
    """
    threads = threads or min(16, os.cpu_count() or 1)
    ahead: deque[tuple[str, Future[Prompt | BadRow]]] = deque()

    def take() -> Prompt | BadRow:
        row_id, future = ahead.popleft()
        read = future.result()
        problem = check_prompt(read) if check_prompt and isinstance(read, Prompt) else None
        return BadRow(schema.source, row_id, schema.their(problem[0]), problem[1]) if problem else read

    with ThreadPoolExecutor(threads) as pool:
        for row_id, row in rows:
            ahead.append((row_id, pool.submit(read_prompt, row_id, row, schema)))
            if len(ahead) > 4 * threads:
                yield take()
        while ahead:
            yield take()


def check_rows(
    rows: Rows,
    indices: Iterable[int] | None = None,
    check_prompt: PromptCheck | None = None,
    threads: int | None = None,
) -> list[BadRow]:
    """The bad ones of the rows at `indices` (None: all), so that ranks can share the work and gather the result."""
    looked = examine(rows.numbered(indices), rows.schema, check_prompt, threads)
    return [found for found in looked if isinstance(found, BadRow)]


def _prompt(row_id: str, row: dict[str, Any], schema: Schema) -> Prompt:
    needed = schema.needs.columns
    text = {name: _text(name, row.get(name), name in needed) for name in _TEXT}
    if "qa_type" in needed and text["qa_type"] not in QUESTION_TYPES:
        raise _RowError("qa_type", f"must be one of {', '.join(QUESTION_TYPES)}, got {text['qa_type'][:40]!r}")
    if "qa_solution" in needed and extract_answer(text["qa_solution"]) is None:
        raise _RowError("qa_solution", "has no <answer>...</answer> with something in it, or ends with an empty one")
    similarity = _similarity(row.get("pair_similarity"))
    try:
        image = decode_image(row.get("real_image"), schema.folder, absolute=schema.absolute)
    except ImageError as error:
        raise _RowError("real_image", str(error)) from error
    return Prompt(
        id=row_id,
        caption=text["prompt"],
        image=image,
        question=text["qa_problem"],
        solution=text["qa_solution"],
        question_type=text["qa_type"],
        pair_similarity=similarity,
    )


def _text(column: str, value: Any, needed: bool) -> str:
    """The value if it is text; what is not needed may be anything else, and is then empty."""
    if not isinstance(value, str):
        reason = f"must be text, got {'nothing' if value is None else 'a ' + type(value).__name__}"
    elif not value.strip():
        reason = "is empty"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        reason = "is not valid Unicode"
    elif "\0" in value:
        reason = "has a NUL character"
    else:
        return value
    if needed:
        raise _RowError(column, reason)
    return ""


def _similarity(value: Any) -> float:
    if value is None:
        return 1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise _RowError("pair_similarity", f"must be a number from 0 to 1, got {str(value)[:40]!r}")
    return number
