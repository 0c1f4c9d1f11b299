"""Rows of the training data that no stage trains on."""

from collections.abc import Collection, Sequence

from fastcorl.data.prompts import PromptData
from fastcorl.data.quarantine import Quarantine
from fastcorl.data.rows import Rows, RowStream
from fastcorl.data.sampler import permutation
from fastcorl.data.streaming import ShuffledStream
from fastcorl.data.validation import BadRow, PromptCheck, read_prompt
from fastcorl.errors import UserError
from fastcorl.plugins import is_spec
from fastcorl.records import Prompt

ORDER = "held out"  # the name of no stage; the choice does not depend on the run's seed


def evaluation_order(rows: Rows) -> list[int]:
    """Indices of held-out rows in the order they are taken: a user's function gives them in an order of its own, files
    and data sets often sorted by kind, so theirs is shuffled."""
    is_function = is_spec(rows.schema.source.rpartition(" ")[2])
    return list(range(len(rows))) if is_function else permutation(len(rows), 0, ORDER, 0)


def hold_out(
    rows: Rows,
    count: int,
    exclude: Collection[str] = (),
    *,
    quarantine: Quarantine | None = None,
    check_prompt: PromptCheck | None = None,
) -> tuple[PromptData, frozenset[str]]:
    """`count` prompts of the rows not in `exclude`, and their ids, for the sources of training prompts to exclude.

    With a `quarantine` the rows have not been looked at yet: each chosen one is, and bad ones are passed over.
    """
    data = PromptData(rows).without(exclude)
    held: list[int] = []
    for place in permutation(len(data), 0, ORDER, 0):
        if len(held) == count:
            break
        if quarantine is None or _is_good(data.read(place, check_prompt), quarantine):
            held.append(data.indices[place])
    if len(held) < count or count == len(data):
        raise UserError(f"data.held_out_rows {count} leaves none of the {len(data)} rows of {rows.source} to train on")
    return PromptData(rows, held), frozenset(map(str, held))


def hold_out_of_stream(
    stream: RowStream,
    count: int,
    shuffle_buffer: int,
    quarantine: Quarantine,
    check_prompt: PromptCheck | None = None,
) -> tuple[Sequence[Prompt], frozenset[str]]:
    """As `hold_out`, of the first rows that come through the shuffle buffer; bad ones are passed over."""
    order = ShuffledStream(stream, 0, ORDER, shuffle_buffer, lambda row_id, row: True, "been found")
    held: dict[str, Prompt] = {}
    place = 0
    while len(held) < count:
        row_id, row = order.at(place, keep_from=place)
        if order.size is not None:
            raise UserError(f"data.held_out_rows {count} leaves no row of {stream.source} to train on")
        read = read_prompt(row_id, row, stream.schema, check_prompt)
        if _is_good(read, quarantine):
            held[row_id] = read
        place += 1
    return list(held.values()), frozenset(held)


def _is_good(read: Prompt | BadRow, quarantine: Quarantine) -> bool:
    bad = read if isinstance(read, BadRow) else None
    quarantine.see(bad.row if bad else read.id, bad)
    return bad is None
