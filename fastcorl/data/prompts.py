"""Where a stage's prompts come from, and the source for rows that can be had by index."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from fastcorl.config_data import QUESTION_TYPES
from fastcorl.data.quarantine import Quarantine
from fastcorl.data.rows import Rows
from fastcorl.data.sampler import PromptSampler, reserve_block
from fastcorl.data.validation import BadRow, PromptCheck, read_prompt
from fastcorl.errors import UserError
from fastcorl.records import Prompt
from fastcorl.tasks import check_world

ATTEMPTS = 20


class PromptSource(ABC):
    """A stage's prompts as a function of seed, stage and step alone, whatever was asked before.

    A row that is found bad when it is taken goes to `quarantine`, and one of the reserve stands in for it.
    """

    size: int | None
    """How many prompts there are; None where that is not known."""

    def __init__(self, stage: str, prompts_per_step: int, quarantine: Quarantine):
        self.stage = stage
        self.prompts_per_step = prompts_per_step
        self.quarantine = quarantine

    def take(self, step: int, rank: int, world: int) -> list[Prompt]:
        """The prompts of `step`, counted from 1, that `rank` of `world` takes."""
        return [self._prompt(step, 0, place) for place in self._places(rank, world)]

    def reserve(self, step: int, round: int, count: int, rank: int, world: int) -> list[Prompt]:
        """`count` further prompts for this rank, in place of as many of its own of this step.

        Ranks may ask for different numbers, each at most what `take` gives. No two ranks or rounds (1, 2, ..) of a step
        get the same prompt as long as there are enough.
        """
        places = self._places(rank, world)
        if round < 1 or count > len(places):
            raise ValueError(f"round {round} must be at least 1, and count {count} at most {len(places)}")
        return [self._prompt(step, round, place) for place in places[:count]]

    def check(self, world: int) -> None:
        """Raise UserError where the prompts of a step do not divide by `world`, or are more than are known to exist."""
        check_world(self.stage, self.prompts_per_step, world)

    @abstractmethod
    def _read(self, step: int, block: int, place: int) -> Prompt | BadRow:
        """The row at a place of a block of the step's reserve, or of the step itself in block -1."""

    def _places(self, rank: int, world: int) -> range:
        self.check(world)
        return range(rank, self.prompts_per_step, world)

    def _prompt(self, step: int, round: int, place: int) -> Prompt:
        try:
            for attempt in range(ATTEMPTS):
                read = self._read(step, reserve_block(round, attempt), place)
                if isinstance(read, Prompt):
                    self.quarantine.see(read.id, None)
                    return read
                self.quarantine.see(read.row, read)
            raise UserError(f"{read} (and {ATTEMPTS - 1} rows before it are bad too)")
        except UserError as error:
            error.local = True  # ranks read different rows
            raise


class MapPrompts(PromptSource):
    """Prompts of rows that can be had by index, in seeded permutations.

    Rows in `exclude` (by id: bad ones, held-out ones) are left out. `check_prompt` tells what the model cannot take; it
    may be None where all rows have been looked at.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        stage: str,
        prompts_per_step: int,
        quarantine: Quarantine,
        types: Collection[str] = QUESTION_TYPES,
        exclude: Collection[str] = (),
        check_prompt: PromptCheck | None = None,
    ):
        super().__init__(stage, prompts_per_step, quarantine)
        self.data = PromptData(rows).without(exclude).only(types)
        self.size = len(self.data)
        self.sampler = PromptSampler(self.size, seed, prompts_per_step, stage)
        self.check_prompt = check_prompt

    def _read(self, step: int, block: int, place: int) -> Prompt | BadRow:
        places = self.sampler.indices(step) if block < 0 else self.sampler.reserve(step, block)
        return self.data.read(places[place], self.check_prompt)


class PromptData(Sequence[Prompt]):
    """Prompts of rows, made when asked for. A prompt's id is its row's index in the source, also after `only`."""

    def __init__(self, rows: Rows, indices: Sequence[int] | None = None):
        self.rows = rows
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Prompt:
        read = self.read(position)
        if isinstance(read, BadRow):
            raise UserError(str(read))
        return read

    def read(self, position: int, check_prompt: PromptCheck | None = None) -> Prompt | BadRow:
        index = self.indices[position]
        return read_prompt(str(index), self.rows[index], self.rows.schema, check_prompt)

    def without(self, ids: Collection[str]) -> "PromptData":
        """The prompts but those with these ids."""
        return PromptData(self.rows, [index for index in self.indices if str(index) not in ids]) if ids else self

    def only(self, types: Collection[str]) -> "PromptData":
        """The prompts whose question is of one of `types`. Rows of no known type stay: they are bad when met."""
        types = tuple(types)  # a cell may hold what has no hash
        others = tuple(kind for kind in QUESTION_TYPES if kind not in types)
        if not others:
            return self
        all_types = self.rows.column("qa_type")
        if not any(all_types[index] in types for index in self.indices):
            raise UserError(f"{self.rows.source}: no row has a question of type {' or '.join(sorted(types))}")
        return PromptData(self.rows, [index for index in self.indices if all_types[index] not in others])
