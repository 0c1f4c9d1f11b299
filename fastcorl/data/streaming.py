"""Prompts of rows that come one after another. Nothing is kept between runs: a resumed one reads the stream again and
skips, without decoding an image."""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from fastcorl.config_data import QUESTION_TYPES
from fastcorl.data.prompts import PromptSource
from fastcorl.data.quarantine import Quarantine
from fastcorl.data.rows import Row, RowStream
from fastcorl.data.sampler import first_place, permutation, reserve_stage
from fastcorl.data.schema import Unreadable
from fastcorl.data.validation import BadRow, PromptCheck, read_prompt
from fastcorl.errors import UserError
from fastcorl.records import Prompt
from fastcorl.tasks import setting

NumberedRow = tuple[str, Row]

RESERVE_WINDOW = 100  # steps


class StreamPrompts(PromptSource):
    """Prompts of a stream, shuffled through a buffer of `shuffle_buffer` encoded rows.

    Order of shards and buffer are seeded by (seed, stage, epoch). The reserve is the same stream in another order, a
    new one every 100 steps: a rank that needs it while others do not must not skip all that came before. It may hold
    what the step itself takes. Each rank reads the whole stream and decodes its own images only.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        seed: int,
        stage: str,
        prompts_per_step: int,
        shuffle_buffer: int,
        quarantine: Quarantine,
        types: Collection[str] = QUESTION_TYPES,
        exclude: Collection[str] = (),
        check_prompt: PromptCheck | None = None,
    ):
        super().__init__(stage, prompts_per_step, quarantine)
        self.schema = stream.schema
        self.check_prompt = check_prompt
        others = tuple(kind for kind in QUESTION_TYPES if kind not in types)  # a cell may hold what has no hash

        def wanted(row_id: str, row: Row) -> bool:
            return row_id not in exclude and (isinstance(row, Unreadable) or row["qa_type"] not in others)

        what = f"a question of type {' or '.join(sorted(types))}"
        self._ordered = partial(ShuffledStream, stream, seed, buffer=shuffle_buffer, wanted=wanted, what=what)
        self._own = self._ordered(stage)
        self._reserve: dict[int, ShuffledStream] = {}  # of one window

    @property
    def size(self) -> int | None:
        return self._own.size

    def check(self, world: int) -> None:
        super().check(world)
        if self.size is not None and self.prompts_per_step > self.size:
            raise UserError(
                f"{setting(self.stage)} {self.prompts_per_step} exceeds the {self.size} prompts there are; lower it"
            )

    def _read(self, step: int, block: int, place: int) -> Prompt | BadRow:
        order = self._own
        if block >= 0:
            window, step = divmod(step - 1, RESERVE_WINDOW)
            order, step = self._reserve_of(window), step + 1
        start = first_place(step, self.prompts_per_step)
        row_id, row = order.at(start + max(block, 0) * self.prompts_per_step + place, keep_from=start)
        self.check(1)  # the first epoch may just have ended, within this step
        return read_prompt(row_id, row, self.schema, self.check_prompt)

    def _reserve_of(self, window: int) -> "ShuffledStream":
        if window not in self._reserve:
            self._reserve = {window: self._ordered(f"{reserve_stage(self.stage)}/{window}")}
        return self._reserve[window]


class ShuffledStream:
    """The wanted rows of a stream in a seeded order, epoch after epoch, by place.

    `size` is the number of wanted rows, known once an epoch has been read. Going forward reads on; going back, or
    beyond an epoch once `size` is known, begins at the start of the epoch that is asked for.
    """

    def __init__(
        self,
        stream: RowStream,
        seed: int,
        stage: str,
        buffer: int,
        wanted: Callable[[str, Row], bool],
        what: str,
    ):
        self.stream = stream
        self.seed = seed
        self.stage = stage
        self.buffer = buffer
        self.wanted = wanted
        self.what = what
        self.size: int | None = None
        self._restart(0)

    def at(self, place: int, keep_from: int) -> NumberedRow:
        """The row at `place`, counted from 0 over all epochs. Those from `keep_from` on stay in memory for later."""
        epoch = keep_from // self.size if self.size else 0
        if keep_from < self._first or (self.size and epoch > self._epoch):
            self._restart(epoch)
        while self._first + len(self._kept) <= place:
            self._kept.append(self._next())
            self._forget(keep_from)
        self._forget(keep_from)
        return self._kept[place - self._first]

    def _forget(self, before: int) -> None:
        while self._kept and self._first < before:
            self._kept.popleft()
            self._first += 1

    def _restart(self, epoch: int) -> None:
        self._epoch = epoch
        self._first = epoch * (self.size or 0)
        self._kept: deque[NumberedRow] = deque()
        self._rows = self._shuffled(epoch)
        self._count = 0

    def _next(self) -> NumberedRow:
        while (found := next(self._rows, None)) is None:
            if self._count == 0:
                raise UserError(f"{self.stream.source}: no row has {self.what}")
            self.size = self._count
            self._epoch += 1
            self._rows = self._shuffled(self._epoch)
            self._count = 0
        self._count += 1
        return found

    def _shuffled(self, epoch: int) -> Iterator[NumberedRow]:
        shards = permutation(len(self.stream.shards), self.seed, f"{self.stage}/shards", epoch)
        rows = (each for each in self.stream.numbered(shards) if self.wanted(*each))
        return shuffled(rows, self.buffer, f"{self.seed}/{self.stage}/{epoch}/")


def shuffled(rows: Iterable[NumberedRow], buffer: int, seed: str) -> Iterator[NumberedRow]:
    """Rows in an order that `seed` decides: each next one is drawn from the `buffer` rows that were read before it.

    Draws are hashes, which no version of a library or of Python changes.
    """
    held: list[NumberedRow] = []
    draws = 0

    def draw(count: int) -> int:
        nonlocal draws
        draws += 1
        return int.from_bytes(hashlib.sha256(f"{seed}{draws}".encode()).digest()[:8], "big") % count

    for row in rows:
        if len(held) < buffer:
            held.append(row)
        else:
            place = draw(buffer)
            yield held[place]
            held[place] = row
    while held:
        yield held.pop(draw(len(held)))
