"""The rows of a data set as prompts."""

from collections.abc import Callable, Collection, Sequence

from fastcorl.data.images import ImageError, decode_image, open_image
from fastcorl.data.rows import Rows
from fastcorl.errors import UserError
from fastcorl.records import Prompt


class PromptData(Sequence[Prompt]):
    """Prompts made when asked for. A prompt's id is its row's index in the source, also after `only`."""

    def __init__(self, rows: Rows, indices: Sequence[int] | None = None):
        self.rows = rows
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Prompt:
        return self._prompt(self.indices[position], decode_image)

    def only(self, types: Collection[str]) -> "PromptData":
        """The prompts whose question is of one of `types`."""
        all_types = self.rows.column("qa_type")
        kept = [index for index in self.indices if all_types[index] in types]
        if not kept:
            raise UserError(f"{self.rows.source}: no row has a question of type {' or '.join(sorted(types))}")
        return PromptData(self.rows, kept)

    def check_lengths(self, count_tokens: Callable[[Prompt], tuple[int, int]], limit: int) -> None:
        """Raise UserError for the first prompt whose caption or question is longer than `limit` tokens.

        `count_tokens` gives both lengths; the pixels of the prompts it gets are not decoded yet.
        """
        for index in self.indices:
            counts = count_tokens(self._prompt(index, open_image))
            for part, count in zip(("caption", "question"), counts, strict=True):
                if count > limit:
                    place = f"{self.rows.source}: row {index}"
                    raise UserError(f"{place}: {part} has {count} tokens, data.max_prompt_tokens is {limit}")

    def _prompt(self, index: int, read_image: Callable) -> Prompt:
        row = self.rows[index]
        try:
            image = read_image(row["real_image"], self.rows.folder)
        except ImageError as error:
            raise UserError(f"{self.rows.source}: row {index}: {self.rows.names['real_image']}: {error}") from error
        return Prompt(
            id=str(index),
            caption=row["prompt"],
            image=image,
            question=row["qa_problem"],
            solution=row["qa_solution"],
            question_type=row["qa_type"],
        )
