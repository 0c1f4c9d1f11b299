import math

import pytest

from fastcorl.rewards.captions.jaccard import jaccard, soft_jaccard


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ("a red dog", "a red dog", 1),
        ("two cats", "a red dog on two", 1 / 6),
        ("a red dog on two", "two cats", 1 / 6),
        ("A red dog.", "a  RED dog", 1),
        ("a red dog", "dog red a a a", 1),
        ("a red dog", "a blue dog", 2 / 4),
        ("a red dog", "two cats", 0),
        ("a red dog", "", 0),
        ("a red dog", "...", 0),
        ('a "red" dog, (a cat)', "red dog a cat", 1),
        ("a dog's tail", "a dogs tail", 2 / 4),
    ],
)
def test_word_sets(reference, candidate, expected):
    assert jaccard([reference], [candidate]) == [pytest.approx(expected)]


def test_soft_jaccard_counts_words_that_are_nearly_alike():
    ratio = 2 * 3 / 7  # "dog" and "dogs" share three letters of seven
    assert soft_jaccard(["a red dog"], ["a red dogs"]) == [pytest.approx((2 + ratio) / (6 - 2 - ratio))]
    assert soft_jaccard(["a red dog"], ["A red dog."]) == [pytest.approx((2 + ratio) / (6 - 2 - ratio))]
    assert soft_jaccard(["a red dog", "cat"], ["a red dog", "dog"]) == [1, 0]


@pytest.mark.parametrize("similarity", [jaccard, soft_jaccard])
def test_interface(similarity):
    assert similarity.range == (0, 1)
    values = similarity(["", " ", ".", "a dog"], ["a dog", "", ".", ""])
    assert [math.isnan(value) for value in values] == [True, True, True, False]
    assert similarity([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        similarity(["a", "b"], ["a"])
