import random
import time
from fractions import Fraction

import pytest

from fastcorl.records import Prompt
from fastcorl.rewards.answers.matching import canonical, same_answer, soft_jaccard
from fastcorl.rewards.answers.options import parse_options
from fastcorl.rewards.answers.rules import accuracy, is_well_formed

ONES = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(number, join="-", conjunction=" and "):
    """A whole number below a million millions in English."""
    for scale, word in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= scale:
            rest = number % scale
            glue = conjunction if rest < 100 else " "
            return f"{spell(number // scale, join, conjunction)} {word}" + (
                glue + spell(rest, join, conjunction) if rest else ""
            )
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (join + ONES[number % 10] if number % 10 else "")


@pytest.mark.parametrize(("join", "conjunction"), [("-", " and "), (" ", " ")])
def test_spelled_numbers_are_read(join, conjunction):
    rng = random.Random(0)
    numbers = [*range(1, 1200), *(rng.randrange(1, 10 ** rng.randrange(3, 13)) for _ in range(500))]
    for number in numbers:
        assert canonical(spell(number, join, conjunction)) == (number,), spell(number, join, conjunction)
        assert same_answer(f"{number:,}", spell(number, join, conjunction))


def test_single_words_are_read_as_word2number_does():
    w2n = pytest.importorskip("word2number.w2n")
    for word in w2n.american_number_system:
        if word != "point":  # which it takes for 0
            assert canonical(word) == (w2n.word_to_num(word),)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("one two three", (1, 2, 3)),
        ("twenty twenty", (20, 20)),
        ("twenty ten", (20, 10)),
        ("one and two", (1, "and", 2)),
        ("thousand thousand", (1000, 1000)),
        ("five thousand two million", (5000, 2_000_000)),
        ("nineteen hundred", (1900,)),
        ("two hundred and", (200, "and")),
        ("someone", ("someone",)),
        ("1.5 million", (1_500_000,)),
        ("-1 1/2", (Fraction(-3, 2),)),
        ("minus three quarters", (-3, "quarters")),
        ("5 - 3", (5, "-", 3)),
        ("x = -3", ("x", "=", -3)),
        ("(-3)", ("(", -3, ")")),
        ("f(x) - 3", ("f", "(", "x", ")", "-", 3)),
        ("1/2/2020", (1, "/", 2, "/", 2020)),
        ("1/0", (1, "/", 0)),
        ("0/5", (0,)),
        ("1 3/2", (1, Fraction(3, 2))),
        ("1,2,3", (1, ",", 2, ",", 3)),
        ("1,2345", (1, ",", 2345)),
        ("v1.2.3", ("v", Fraction("1.2"), ".", 3)),
        ("1e3", (1000,)),
        ("2e", (2, "e")),
        ("1e999", (1, "e", 999)),
        ("5²", (5, "²")),
        ("9" * 50, ("9" * 50,)),
    ],
)
def test_tokens(text, tokens):
    assert canonical(text) == tokens


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("the X", "X"),
        ("a b", "b"),
        ("A 3", "3"),
        ("?", "!"),
        ("5!", "5"),
        ("the", ""),
        ("half", "0.5"),
        ("US", "USA"),
        ("10^2", "102"),
        ("5²", "52"),
        ("2√3", "√12"),
        ("\\boxed{1} or \\boxed{2}", "1} or \\boxed{2"),
        ("'cat' and 'dog'", "cat' and 'dog"),
        ("$5 or $6", "5 or 6"),
        ("1:2", "0.5"),
        ("1e-3", "-3"),
    ],
)
def test_what_must_stay_apart(a, b):
    assert not same_answer(a, b)


def test_sameness_is_an_equivalence_and_survives_formatting():
    answers = ["3", "three dogs", "on the left", "1/2", "-4", "72°", "y=2x+3", "12:15 pm", "50%", "t-shirt", "$5", "B"]
    dressings = ["{}", " {} ", "{}.", '"{}"', "**{}**", "\\boxed{{{}}}", "\\text{{{}}}", "\\({}\\)", "{} ?", "`{}`."]
    for answer in answers:
        for dressing in dressings:
            assert same_answer(answer, dressing.format(answer)), dressing.format(answer)
        for other in answers:
            assert same_answer(answer, other) == (answer == other or {answer, other} == {"1/2", "50%"})


def test_jaccard_by_hand():
    assert soft_jaccard("red and white", "white and red") == 1.0
    assert soft_jaccard("a b", "b c") == pytest.approx(1 / 3)
    assert soft_jaccard("", "red") == 0.0
    assert soft_jaccard("", "") == 0.0
    # "abcdef" and "abcdeg" are 5/6 alike, "abcdefg" and "abcdef" 12/13: the better pair is made, and only that
    assert soft_jaccard("abcdeg abcdefg", "abcdef") == pytest.approx((12 / 13) / (3 - 12 / 13))
    assert soft_jaccard("abcdefg abcdeg", "abcdef") == pytest.approx((12 / 13) / (3 - 12 / 13))


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Pick. (A) one (B) two", {"A": "one", "B": "two"}),
        ("Pick. (A) one, (B) two or (C) three?", {"A": "one", "B": "two", "C": "three?"}),
        ("Pick. (A) one and (B) two", {"A": "one", "B": "two"}),
        ("Pick: A. one B. two C. three\nAnswer with a letter.", {"A": "one", "B": "two", "C": "three"}),
        ("Pick: A) one B) two", {"A": "one", "B": "two"}),
        ("(A) one (B) two\n(C) three (D) four", {"A": "one", "B": "two", "C": "three", "D": "four"}),
        ("A: 36°\nB: 72°", {"A": "36°", "B": "72°"}),
        ("(a) one (b) two", {"A": "one", "B": "two"}),
        ("Person A: hi. Person B: hello.", {}),
        ("See fig. (A). Which?", {}),
        ("Is A. bigger than B?", {}),
        ("B. two\nC. three", {}),
        ("Points A. and B. are marked.\nA. near\nB. far\nC. equal", {"A": "near", "B": "far", "C": "equal"}),
        ("See (A) left, (B) right.\nA. near\nB. far", {"A": "near", "B": "far"}),
        ("A. x\nB. y\nNow choose:\nA. one\nB. two", {"A": "one", "B": "two"}),
        ("", {}),
    ],
)
def test_options_in_lines_and_in_text(question, options):
    assert parse_options(question) == options


HOSTILE = [
    "$",
    "'",
    "*",
    "\\frac{",
    "{",
    "(A) ",
    "1,",
    "1/",
    "- ",
    "one ",
    "hundred and ",
    "√(",
    "A. x\n",
    "p.",
    ". ! ",
]


@pytest.mark.parametrize("piece", [*HOSTILE, "</think>", "<answer>", "</think><answer>"])
def test_no_answer_takes_long_or_raises(piece):
    text = (piece * 4000)[:6000]
    prompt = Prompt("0", "", None, text, f"<answer>{text[:50]} x</answer>", "OE")
    started = time.process_time()
    accuracy(f"<answer>{text}</answer>", prompt, "soft_jaccard")
    is_well_formed(f"<think>{text}</think><answer>{text}")
    parse_options(text)
    assert time.process_time() - started < 1.0


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [
        *HOSTILE,
        "7",
        "3.5",
        "\\",
        "}",
        "%",
        " ",
        "the ",
        "per cent",
        "million",
        "\u0000",
        "１",
        "😀",
        "<think>",
        "e9",
        ")",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        for kind in ("MC", "OE"):
            prompt = Prompt("0", "", None, text, "<answer>3</answer>", kind)
            assert 0 <= accuracy(f"<answer>{text}</answer>", prompt, "soft_jaccard") <= 1
        assert same_answer(text, text)
