"""Options of a multiple-choice question, and which of them an answer names."""

import re

from fastcorl.rewards.answers.matching import same_answer, unwrap

# How an option may begin; the first form that finds the most options is taken, so lines go before running text.
_MARKERS = (
    re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(?=\S)", re.MULTILINE),
    re.compile(r"^[ \t]*\(?([a-z])[.)][ \t]*(?=\S)", re.MULTILINE),
    re.compile(r"(?<!\w)\(([A-Z])\)\s*(?=\S)"),
    re.compile(r"(?<!\w)\(([a-z])\)\s*(?=\S)"),
    re.compile(r"(?<![\w.(])([A-Z])[.)]\s+(?=\S)"),
)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])[.):]\s*(.+)", re.DOTALL)


def parse_options(question: str) -> dict[str, str]:
    """Options by capital letter: at least two in the order A, B, .., on lines of their own or one behind another.

    Known forms: "A. text", "A) text", "(A) text", on lines also "A: text", and "(a) text" or "a) text". Of several
    lists in a question the longest counts, of equally long ones the last.
    """
    best: list[re.Match] = []
    for marker in _MARKERS:
        longest: list[re.Match] = []
        run: list[re.Match] = []
        for match in marker.finditer(question):
            letter = match[1].upper()
            if letter == "A":
                run = [match]
            elif run and ord(letter) == ord(run[-1][1].upper()) + 1:
                run.append(match)
            if len(run) >= len(longest):
                longest = run
        if len(longest) > len(best):
            best = longest
    if len(best) < 2:
        return {}
    ends = [match.start() for match in best[1:]] + [len(question)]
    options = {}
    for match, end in zip(best, ends, strict=True):
        text = question[match.end() : end].split("\n")[0].strip()
        options[match[1].upper()] = re.sub(r"(?:[,;]|[,;]?\s+(?:and|or))$", "", text)
    return options


def choice_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option that `answer` names by letter ("B", "b", "B.", "(B)"), by its text, or by both if they agree.

    A listed letter goes before a text, a text before a letter that is not listed (options may be in a form that
    `parse_options` does not know). None when the answer names no option or two.
    """
    answer = unwrap(answer)
    match = _LETTER.fullmatch(answer)
    letter = match[1].upper() if match else None
    if letter in options:
        return letter
    # "50%" and "0.5" may both be options: the very words go before what they mean
    for same in (_same_words, same_answer):
        named = [option for option, text in options.items() if same(text, answer)]
        if named:
            return named[0] if len(named) == 1 else None
    if match := _LETTER_AND_TEXT.fullmatch(answer):
        named_letter = match[1].upper()
        letter = named_letter if same_answer(options.get(named_letter, match[2]), match[2]) else None
    return letter


def _same_words(a: str, b: str) -> bool:
    return unwrap(a).casefold().split() == unwrap(b).casefold().split()
