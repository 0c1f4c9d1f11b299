"""One call of the engine: requests wait for room, rows step together, rows that end make room.

A step is one backbone forward over the regions `[image conditional | image unconditional | text]`. Every CHECK_EVERY
steps the host asks which answers have ended; then, and only then, rows leave and others come.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fastcorl.rollout.decoder import Attention
from fastcorl.rollout.prefill import Source
from fastcorl.rollout.requests import Request
from fastcorl.rollout.room import Room
from fastcorl.rollout.rows import ImageRows, TextRows

CHECK_EVERY = {"cpu": 4, "cuda": 16}


class RowCache(Attention, Protocol):
    """Keys and values of the rows that decode, drawings before answers."""

    def set_images(self, sources: Sequence[Source]) -> None: ...
    def add_texts(self, sources: Sequence[Source]) -> None: ...
    def order_texts(self, alive: Sequence[int]) -> list[int]: ...
    def keep_texts(self, rows: Sequence[int]) -> None: ...
    def begin_step(self, images: int, texts: int) -> None: ...
    def advance(self) -> None: ...


class Worker(Protocol):
    """Does on the device what `Decoding` decides on the host."""

    images: ImageRows
    texts: TextRows
    cache: RowCache

    def prefill_images(self, requests: Sequence[Request]) -> list[Source]:
        """Where the rows' prompts stand; of guided drawings all conditional ones before all unconditional ones."""
        ...

    def prefill_texts(self, requests: Sequence[Request]) -> list[Source]: ...
    def settle(self, admitted: Sequence[Request], *, more: bool) -> None:
        """The cache holds the prompts of these requests; `more` of their kind wait."""
        ...

    def sample_images(self, hidden: torch.Tensor, rows: slice) -> None: ...
    def sample_texts(self, hidden: torch.Tensor, rows: slice) -> None: ...
    def step(self) -> None:
        """Feed every row its last token and sample its next."""
        ...


class Decoding:
    """Which requests are where; `run` works them off."""

    def __init__(
        self,
        worker: Worker,
        room: Room,
        image_requests: Sequence[Request],
        text_requests: Sequence[Request],
        *,
        check_every: int,
        progress: Callable[[int], None] | None = None,
        finish_drawings: Callable[[Sequence[int]], None] | None = None,
    ):
        """`finish_drawings` is told the places of drawings when they end."""
        self.worker, self.room = worker, room
        self.images, self.texts, self.cache = worker.images, worker.texts, worker.cache
        self.waiting_images, self.waiting_texts = list(image_requests), list(text_requests)
        self.check_every, self.progress, self.finish_drawings = check_every, progress, finish_drawings
        self.drawing: list[Request] = []
        self.answering: list[Request] = []
        self.drawn = 0  # tokens of the drawings in progress
        self.ages: list[int] = []  # tokens of the answers in progress, ended or not
        self.finished_tokens = 0

    def run(self) -> None:
        self._admit()
        since_check = 0
        while self.drawing or self.answering:
            images_end = bool(self.drawing) and self.drawn == self.images.length
            texts_end = bool(self.answering) and max(self.ages) == self.texts.length
            if images_end or texts_end or since_check == self.check_every:
                self._leave(images_end=images_end)
                self._admit()
                since_check = 0
                continue
            self.worker.step()
            self.drawn += 1
            self.ages = [age + 1 for age in self.ages]
            since_check += 1

    def _leave(self, *, images_end: bool) -> None:
        if images_end:
            self.finished_tokens += len(self.drawing) * self.images.length
            for request in self.drawing:
                self.room.give(request.prefixes(), self.images.length)
            ended, self.drawing = self.drawing, []
            self.images.keep([])
            self.cache.set_images([])
            if self.finish_drawings is not None:
                self.finish_drawings([request.place for request in ended])
        if self.answering:
            alive = self.texts.alive()
            if len(alive) < len(self.answering):
                self._drop_texts(alive)
        if self.progress is not None:
            drawn = self.finished_tokens + len(self.drawing) * self.drawn
            self.progress(drawn + int(self.texts.out_lengths[: self.texts.nobody].sum()))

    def _drop_texts(self, alive: list[int]) -> None:
        going = set(alive)
        for row, request in enumerate(self.answering):
            if row not in going:
                self.room.give(request.prefixes(), self.texts.length)
        order = self.cache.order_texts(alive)
        self.texts.keep(order)
        self.cache.keep_texts(order)
        self.answering = [self.answering[row] for row in order]
        self.ages = [self.ages[row] for row in order]

    def _admit(self) -> None:
        # Drawings come in waves, since they all take equally long.
        if self.waiting_images and not self.drawing:
            self.drawing = self._next(self.waiting_images, self.images.length)
            if self.drawing:
                sources = self.worker.prefill_images(self.drawing)
                self.cache.set_images(sources)
                rows = self.images.add(*_places_and_seeds(self.drawing))
                self.worker.sample_images(_last_states(sources), rows)
                self.worker.settle(self.drawing, more=bool(self.waiting_images))
                self.drawn = 1
        if self.waiting_texts:
            new = self._next(self.waiting_texts, self.texts.length)
            if new:
                sources = self.worker.prefill_texts(new)
                self.cache.add_texts(sources)
                rows = self.texts.add(*_places_and_seeds(new))
                self.worker.sample_texts(_last_states(sources), rows)
                self.worker.settle(new, more=bool(self.waiting_texts))
                self.answering += new
                self.ages += [1] * len(new)

    def _next(self, waiting: list[Request], tokens: int) -> list[Request]:
        """Takes from the waiting requests those that there is room for."""
        count = 0
        # The prompt's last token is a row's own; the last sampled token is never fed.
        while count < len(waiting) and self.room.take(waiting[count].prefixes(), tokens):
            count += 1
        taken, waiting[:] = waiting[:count], waiting[count:]
        return taken


def _places_and_seeds(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    return [request.place for request in requests], [request.seed for request in requests]


def _last_states(sources: Sequence[Source]) -> torch.Tensor:
    """(rows, hidden): the final state of each row's prompt."""
    distinct = list(dict.fromkeys(sources))
    index = {source: i for i, source in enumerate(distinct)}
    states = torch.stack([source.prefill.hidden[source.index] for source in distinct])
    return states[torch.tensor([index[source] for source in sources], device=states.device)]
