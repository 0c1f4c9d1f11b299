"""The answer rewards on a table of rows in the forms of the paper's data sets, with what ULM-R1 gives for each.

`golden_answers.json`, a row a line: `strict`, `soft` and `format` are what our rewards give, `upstream` and
`upstream_format` what the public code's accuracy and format rewards gave when it was run on the row, and `note` says
why, wherever that is not the paper's score.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from fastcorl.records import Prompt
from fastcorl.rewards.answers.matching import soft_jaccard
from fastcorl.rewards.answers.rules import accuracy, extract_answer, is_well_formed

CASES = json.loads((Path(__file__).parent / "golden_answers.json").read_text(encoding="utf-8"))


def name(case):
    return f"{case['data']}: {case['solution']} {case['answer']}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_scores(case):
    prompt = Prompt("0", "", None, case["question"], case["solution"], case["type"])
    assert accuracy(case["answer"], prompt) == case["strict"]
    assert accuracy(case["answer"], prompt, "soft_jaccard") == pytest.approx(case["soft"], abs=1e-4)
    assert is_well_formed(case["answer"]) == case["format"]


# Where both go by words: not for a match, nor for an answer that the public code's pattern reads otherwise.
PARTIAL = [
    case
    for case in CASES
    if case["type"] == "OE" and case["data"] != "format" and case["strict"] < 1 > case["upstream"]
]


@pytest.mark.parametrize("case", PARTIAL, ids=name)
def test_our_jaccard_is_the_public_codes(case):
    given, solution = extract_answer(case["answer"]), extract_answer(case["solution"])
    assert soft_jaccard(given.rstrip(".,!?"), solution) == pytest.approx(case["upstream"], abs=1e-4)


def test_the_table_is_what_it_says():
    assert len(CASES) >= 250
    assert min(Counter(case["type"] for case in CASES).values()) >= 90
    assert len({name(case) + case["question"] for case in CASES}) == len(CASES)
    assert len(PARTIAL) >= 40
    differing = [
        case for case in CASES if case["upstream"] != case["strict"] or case["upstream_format"] != case["format"]
    ]
    assert len(differing) >= 150
    for case in CASES:
        assert bool(case.get("note")) == (case in differing), name(case)
        assert case["strict"] in (0, 1)
        assert case["strict"] <= case["soft"] <= 1
        assert case["type"] == "OE" or case["soft"] == case["strict"]
