r"""When two short answers say the same.

Not differences: case, spacing, final punctuation, quotes, bold, a leading article, the ways to write a number
(1,000 = 1000 = one thousand; 0.5 = 1/2 = 50% = \frac{1}{2}), the ways to typeset it (\boxed{}, $..$, \text{}).
Differences: everything else. Units stay (5 cm is neither 5 nor 50 mm, and 50% is not 50), nothing is rounded
(1/3 is not 0.33), words have no synonyms and mathematics beyond a single number is compared as written.
"""

import re
from difflib import SequenceMatcher

from fastcorl.rewards.answers.numbers_in_text import Token, read_numbers, tokenise

_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’"}
_MATHS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "’": "'", "⁄": "/", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "~": " "})
_INLINE_MATHS = re.compile(r"\$(?=\S)([^$]*[^$\s])\$(?!\d)")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LATEX_ROOT = re.compile(r"\\?(?<![A-Za-z])sqrt\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d))|√\s*\(([^()]*)\)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX_SIGNS = {
    "{,}": ",",
    r"\%": "%",
    r"\$": "$",
    r"^{\circ}": "°",
    r"^\circ": "°",
    r"\pi": "π",
    r"\times": "×",
    r"\cdot": "·",
} | dict.fromkeys((r"\left", r"\right", r"\!", r"\,", r"\;", r"\:", "\\ "), "")
_SIMPLE = re.compile(r"[\w.√]+")
_NOON = re.compile(r"\b([ap])\.\s?m\b\.?")


def unwrap(answer: str) -> str:
    r"""`answer` without outer spacing, final punctuation, quotes, bold, maths delimiters, \boxed{} and \text{}."""
    while True:
        before = answer
        answer = _without_final_punctuation(answer.strip())
        inner = answer[1:-1]
        if inner and _QUOTES.get(answer[0]) == answer[-1] and answer[0] not in inner and answer[-1] not in inner:
            answer = inner
        if answer.startswith("*") and answer.endswith("*") and answer.strip("*"):
            answer = answer.strip("*")
        for left, right in _MATHS:
            inner = answer[len(left) : -len(right)]
            if inner and answer.startswith(left) and answer.endswith(right) and left not in inner:
                answer = inner
        if match := re.fullmatch(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{(.*)\}", answer, re.DOTALL):
            answer = match[1] if match[1].strip() and _is_balanced(match[1]) else answer
        if answer == before:
            return answer


def _without_final_punctuation(text: str) -> str:
    stripped = text.rstrip(".,;:!?")
    if stripped[-1:].isdigit() and text[len(stripped) :].startswith("!"):
        stripped += "!"  # 5! is 120
    return stripped or text


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def _group(part: str) -> str:
    part = part.strip()
    return part if _SIMPLE.fullmatch(part) else f"({part})"


def _without_latex(text: str) -> str:
    text = _INLINE_MATHS.sub(r"\1", text)
    for sign, plain in _LATEX_SIGNS.items():
        text = text.replace(sign, plain)
    text = _LATEX_TEXT.sub(r" \1 ", text)
    text = _LATEX_ROOT.sub(lambda match: "√" + _group(next(part for part in match.groups() if part is not None)), text)
    return _LATEX_FRACTION.sub(
        lambda match: " {}/{}".format(*(_group(part) for part in match.groups() if part is not None)), text
    )


def canonical(answer: str) -> tuple[Token, ...]:
    """The tokens that two answers must share to be the same."""
    text = _without_latex(unwrap(answer).translate(_CHARACTERS)).casefold()
    tokens = ["π" if token == "pi" else token for token in tokenise(_NOON.sub(r"\1m", unwrap(text)))]
    if len(tokens) > 1 and tokens[0] in ("a", "an", "the"):
        follower = tokens[1]
        # a single letter is more likely an option or a name: "A B", "the X"
        is_word = isinstance(follower, str) and follower.isalpha() and len(follower) > 1
        if is_word or (tokens[0] == "the" and not isinstance(follower, str)):
            tokens = tokens[1:]
    return read_numbers(tokens)


def same_answer(a: str, b: str) -> bool:
    return canonical(a) == canonical(b)


def soft_jaccard(given: str, solution: str, threshold: float = 0.8) -> float:
    """Overlap of two sets of words in [0, 1], as ULM-R1 scores open-ended answers.

    Case is ignored; a pair of unequal words counts by `SequenceMatcher.ratio` where that reaches
    `threshold`. A word is in one pair at most, best pairs first: the public code takes them in the order of a set,
    so that there a score can change from run to run.
    """
    words, others = (list(dict.fromkeys(text.lower().split())) for text in (given, solution))
    common = set(words) & set(others)
    pairs = []
    for i, word in enumerate(words):
        for j, other in enumerate(others):
            if word in common or other in common:
                continue
            # ratio() costs the product of the lengths, and cannot reach more than this
            if 2 * min(len(word), len(other)) >= threshold * (len(word) + len(other)):
                ratio = SequenceMatcher(None, word, other).ratio()
                if ratio >= threshold:
                    pairs.append((-ratio, i, j))
    overlap, used_words, used_others = float(len(common)), set(), set()
    for negative_ratio, i, j in sorted(pairs):
        if i not in used_words and j not in used_others:
            overlap -= negative_ratio
            used_words.add(i)
            used_others.add(j)
    union = len(words) + len(others) - overlap
    return overlap / union if union else 0.0
