"""The language of the quickstart: captions of digit scenes, their exact parser, and questions about a scene.

A scene is a tuple of `Item`s in reading order. Captions are unambiguous, so `parse_caption` recovers the scene graph
exactly; that makes SPICE's definition (F1 over scene-graph tuples) computable without a statistical parser.
"""

import random
import re
from typing import NamedTuple

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.25, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.8, 0.2, 1.0),
    "white": (1.0, 1.0, 1.0),
}
CELLS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("zero", "one", "two", "three", "four")
LETTERS = "ABCD"

_ITEM = re.compile(rf"\ba ({'|'.join(COLOURS)}) ({'|'.join(DIGITS)}) at ({'|'.join(CELLS)})(?![a-z])")


class Item(NamedTuple):
    """One digit of a scene: `digit` 0-9, `colour` a key of COLOURS, `cell` 0-3 in reading order."""

    digit: int
    colour: str
    cell: int

    def describe(self) -> str:
        return f"a {self.colour} {DIGITS[self.digit]} at {CELLS[self.cell]}"


class Question(NamedTuple):
    """A question and its answer; `kind` is "MC" or "OE". Reasoning names what is seen, then what follows from it."""

    problem: str
    thought: str
    conclusion: str  # in words; also where `answer` is a letter
    answer: str
    kind: str

    @property
    def solution(self) -> str:
        """The solution in CoT format."""
        return f"<think>{self.thought}, so {self.conclusion}</think><answer>{self.answer}</answer>"


def caption(items: tuple[Item, ...]) -> str:
    """One sentence that names every item: "a red three at top left and a blue seven at bottom right"."""
    parts = [item.describe() for item in items]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def parse_caption(text: str) -> tuple[Item, ...]:
    """Items that `text` names, in order of appearance; anything outside the grammar is ignored."""
    return tuple(
        Item(DIGITS.index(digit), colour, CELLS.index(cell)) for colour, digit, cell in _ITEM.findall(text.lower())
    )


def scene_tuples(text: str) -> set[tuple[str, ...]]:
    """Scene-graph tuples of a caption, as SPICE counts them: objects, attributes and relations.

    Two items with the same digit are told apart by a running number, as SPICE's merged objects would be by theirs.
    """
    tuples: set[tuple[str, ...]] = set()
    seen: dict[str, int] = {}
    for item in parse_caption(text):
        name = DIGITS[item.digit]
        number = seen[name] = seen.get(name, 0) + 1
        name = name if number == 1 else f"{name}#{number}"
        tuples |= {(name,), (name, item.colour), (name, "at", CELLS[item.cell])}
    return tuples


def ask(items: tuple[Item, ...], rng: random.Random, kind: str) -> Question:
    """A question about the scene, drawn by `rng`: which digit, which colour, where, or how many.

    The reasoning names the item, or all of them for a count.
    """
    item = rng.choice(items)
    topics = ["digit", "colour", "count"]
    if sum(other.colour == item.colour for other in items) == 1:
        topics.append("cell")
    topic = rng.choice(topics)
    thought = caption(items) if topic == "count" else item.describe()
    if topic == "digit":
        problem, conclusion, pool = f"what digit is at {CELLS[item.cell]}?", DIGITS[item.digit], DIGITS
    elif topic == "colour":
        problem, conclusion, pool = f"what colour is the digit at {CELLS[item.cell]}?", item.colour, tuple(COLOURS)
    elif topic == "cell":
        problem, conclusion, pool = f"where is the {item.colour} digit?", CELLS[item.cell], CELLS
    else:
        problem, conclusion, pool = "how many digits are there?", COUNTS[len(items)], COUNTS[1:]
    answer = conclusion
    if kind == "MC":
        options = [answer, *rng.sample([other for other in pool if other != answer], len(LETTERS) - 1)]
        rng.shuffle(options)
        problem += "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
        answer = LETTERS[options.index(answer)]
    return Question(problem, thought, conclusion, answer, kind)
