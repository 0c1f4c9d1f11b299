"""Prompts that a model cannot take: too long, or with its image placeholder in the text."""

from collections import Counter
from typing import Any, Protocol

from fastcorl.data.schema import Needs
from fastcorl.records import Prompt


class Encoder(Protocol):
    """What is asked of the model's prompt encoder."""

    processor: Any
    image_id: int

    def draw(self, caption: str) -> list[int]: ...

    def ask(self, question: str, question_type: str | None = None) -> list[int]: ...


class PromptLengths:
    """A `PromptCheck` that counts tokens: `captions` and `questions` hold how many prompts have each length.

    Lengths are those of the whole prompt, chat template and image features included; `limit` bounds each. Only what
    `needs` asks for is counted.
    """

    def __init__(self, encoder: Encoder, limit: int, needs: Needs, key: str = "data.max_prompt_tokens"):
        self.encoder = encoder
        self.limit = limit
        self.needs = needs
        self.key = key
        self.captions: Counter[int] = Counter()
        self.questions: Counter[int] = Counter()

    def __call__(self, prompt: Prompt) -> tuple[str, str] | None:
        encoder, image_tokens = self.encoder, self.encoder.processor.num_image_tokens
        problem = None
        if self.needs.draw:
            problem = self._problem("caption", encoder.draw(prompt.caption), 0, self.captions)
        if self.needs.answer and problem is None:
            ids = encoder.ask(prompt.question, prompt.question_type)
            problem = self._problem("question", ids, image_tokens, self.questions)
        return problem

    @property
    def longest_caption(self) -> int:
        return max(self.captions, default=0)

    @property
    def longest_question(self) -> int:
        return max(self.questions, default=0)

    def _problem(self, part: str, ids: list[int], images: int, counts: Counter[int]) -> tuple[str, str] | None:
        column = {"caption": "prompt", "question": "qa_problem"}[part]
        if ids.count(self.encoder.image_id) != images:
            return column, f"{part} contains {self.encoder.processor.image_token!r}, which stands for an image"
        if len(ids) > self.limit:
            return column, f"{part} has {len(ids)} tokens, {self.key} is {self.limit}"
        counts[len(ids)] += 1
        return None
