import math

import pytest

from fastcorl.quickstart.grammar import scene_tuples
from fastcorl.rewards import TupleSimilarity, tuple_f1


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ({1, 2, 3}, {1, 2, 3}, 1.0),
        ({1, 2, 3}, {4}, 0.0),
        ({1, 2, 3}, set(), 0.0),
        ({1, 2, 3}, {1}, 0.5),  # precision 1, recall 1/3
        ({1, 2}, {2, 3, 4}, 0.4),  # precision 1/3, recall 1/2
        ({("dog",), ("dog", "red")}, {("dog",), ("dog", "blue")}, 0.5),
    ],
)
def test_f1(reference, candidate, expected):
    assert tuple_f1(reference, candidate) == pytest.approx(expected)


@pytest.mark.parametrize("candidate", [set(), {1}])
def test_an_empty_reference_cannot_be_scored(candidate):
    assert math.isnan(tuple_f1(set(), candidate))


def test_captions_are_compared_pair_by_pair_and_parsed_once():
    left, right = "a red three at top left", "a red three at top right"
    parsed = []
    similarity = TupleSimilarity(lambda text: parsed.append(text) or scene_tuples(text))
    assert similarity([left, left, right], [left, right, left]) == pytest.approx([1.0, 2 / 3, 2 / 3])
    assert sorted(parsed) == [left, right]


def test_a_caption_outside_the_grammar_is_a_nan():
    similarity = TupleSimilarity(lambda text: set() if "blue" in text else {text})
    scores = similarity(["a red three", "a blue two"], ["a red three", "a red three"])
    assert scores[0] == 1 and math.isnan(scores[1])
