"""Rules that score a text answer: format and accuracy, both 0 or 1 (CoRL, arXiv 2505.17534, section 3.2)."""

import math
import re

import torch

from fastcorl.records import Prompt, Rollout

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.)][ \t]*(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])[.):]\s*(.+)", re.DOTALL)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}


def extract_answer(text: str) -> str | None:
    """What stands in the last complete `<answer>` pair, trimmed; None when there is none or it is blank."""
    found = _ANSWER.findall(text)
    return (found[-1].strip() or None) if found else None


def is_well_formed(text: str) -> bool:
    """Whether `text` is `<think>..</think><answer>..</answer>` and nothing else.

    Each tag appears once, both parts say something, and only whitespace stands between and around them.
    """
    match = _FORMAT.fullmatch(text.strip())
    return match is not None and all(text.count(tag) == 1 for tag in _TAGS) and all(map(str.strip, match.groups()))


def normalise(answer: str) -> str:
    """Case, spacing, trailing punctuation and number words (zero to twenty) removed as differences."""
    words = answer.casefold().strip().rstrip(".,;:!?").split()
    return " ".join(_DIGITS.get(word, word) for word in words)


def parse_options(question: str) -> dict[str, str]:
    """Options of a multiple-choice question, one per line: "A. text", "A) text" or "(A) text"."""
    return {letter: text.strip() for letter, text in _OPTION.findall(question)}


def choice_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option that `answer` names by letter ("B", "b", "B.", "(B)"), by its text, or by both if they agree.

    A listed letter goes before a text, a text before a letter that is not listed (options may be in a form that
    `parse_options` does not know). None when the answer names no option or two.
    """
    match = _LETTER.fullmatch(answer)
    letter = match[1].upper() if match else None
    if letter in options:
        return letter
    same_text = [option for option, text in options.items() if normalise(text) == normalise(answer)]
    if same_text:
        return same_text[0] if len(same_text) == 1 else None
    if match := _LETTER_AND_TEXT.fullmatch(answer):
        named = match[1].upper()
        letter = named if normalise(options.get(named, match[2])) == normalise(match[2]) else None
    return letter


def is_correct(answer: str, prompt: Prompt) -> float:
    """1.0 or 0.0 for the tagged answer in `answer` against the prompt's solution; NaN if the solution has no answer."""
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
    return float(normalise(solution) == normalise(given))


class FormatReward:
    """1 where the answer has exactly the asked-for form, else 0."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        texts = rollout.texts
        scores = [is_well_formed(answer) for answer in texts.answers]
        return torch.tensor(scores, dtype=torch.float32, device=texts.tokens.device)


class AccuracyReward:
    """1 where the tagged answer is right, else 0; each row is judged by its own prompt's question type."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        texts = rollout.texts
        scores = [is_correct(answer, rollout.prompt_of(row)) for row, answer in enumerate(texts.answers)]
        return torch.tensor(scores, dtype=torch.float32, device=texts.tokens.device)
