"""Rules that score a text answer: format and accuracy (CoRL, arXiv 2505.17534, section 3.2)."""

import math
import re
from typing import Literal

import torch

from fastcorl.answer_tags import extract_answer
from fastcorl.records import Prompt, Rollout
from fastcorl.rewards.answers.matching import same_answer, soft_jaccard
from fastcorl.rewards.answers.options import choice_letter, parse_options

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)

AccuracyMode = Literal["strict", "soft_jaccard"]


def is_well_formed(text: str) -> bool:
    """Whether `text` is `<think>..</think><answer>..</answer>` and nothing else.

    Each tag appears once, both parts say something, and only whitespace stands between and around them.
    """
    match = _FORMAT.fullmatch(text.strip())
    return match is not None and all(text.count(tag) == 1 for tag in _TAGS) and all(map(str.strip, match.groups()))


def accuracy(answer: str, prompt: Prompt, mode: AccuracyMode = "strict") -> float:
    """Score in [0, 1] of the tagged answer in `answer` against the prompt's solution; NaN if that has no answer.

    "strict" gives 0 or 1, as the paper says; what counts as the same is said in `answers.matching`. "soft_jaccard" is
    the public code's partial credit: an open-ended answer that is not the same earns the overlap of its words. There
    the public code also takes multiple choice for open-ended and reads answers without tags; here it does not.
    """
    if prompt.question_type not in ("MC", "OE"):
        raise ValueError(f"prompt {prompt.id!r}: question_type is {prompt.question_type!r}, not 'MC' or 'OE'")
    solution, given = extract_answer(prompt.solution), extract_answer(answer)
    if solution is None:
        return math.nan
    if given is None:
        return 0.0
    if prompt.question_type == "MC":
        options = parse_options(prompt.question)
        expected, chosen = choice_letter(solution, options), choice_letter(given, options)
        if expected is not None and chosen is not None:
            return float(expected == chosen)
    if same_answer(solution, given):
        return 1.0
    if mode == "soft_jaccard" and prompt.question_type == "OE":
        return soft_jaccard(given.rstrip(".,!?"), solution)
    return 0.0


class FormatReward:
    """1 where the answer has exactly the asked-for form, else 0."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        texts = rollout.texts
        scores = [is_well_formed(answer) for answer in texts.answers]
        return torch.tensor(scores, dtype=torch.float32, device=texts.tokens.device)


class AccuracyReward:
    """`accuracy` of each row, (n,) float32 in [0, 1], judged by its own prompt's question type."""

    range = (0.0, 1.0)

    def __init__(self, mode: AccuracyMode = "strict") -> None:
        self.mode = mode

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        texts = rollout.texts
        scores = [accuracy(answer, rollout.prompt_of(row), self.mode) for row, answer in enumerate(texts.answers)]
        return torch.tensor(scores, dtype=torch.float32, device=texts.tokens.device)
