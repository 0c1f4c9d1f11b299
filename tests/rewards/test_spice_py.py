import math

import numpy as np
import pytest

from fastcorl.rewards.captions.scene_parser import scene_tuples
from fastcorl.rewards.captions.spice_py import SpicePy
from fastcorl.rewards.captions.synonyms import SYNONYMS
from tests.rewards.spice_examples import EXAMPLES


def test_scores():
    spice_py = SpicePy()
    assert spice_py.range == (0.0, 1.0)
    references = ["a red bus on a street", "a red bus", "a dog and a cat", "a dog"]
    candidates = ["a red bus on a street", "a blue bus", "a dog", "a boat"]
    # bus, red; bus, blue | dog, cat; dog
    assert spice_py(references, candidates) == [1.0, 0.5, pytest.approx(2 / 3), 0.0]


def test_a_caption_that_names_nothing():
    scores = SpicePy()(["...", "...", "a dog"], ["a dog", "...", "..."])
    assert [math.isnan(score) for score in scores] == [True, True, False]
    assert scores[2] == 0.0


def test_as_many_candidates_as_references():
    with pytest.raises(ValueError, match="shorter"):
        SpicePy()(["a dog", "a cat"], ["a dog"])
    assert SpicePy()([], []) == []


def test_each_distinct_caption_is_parsed_once():
    spice_py = SpicePy()
    spice_py(["a dog"] * 50, ["a cat", "a dog"] * 25)
    spice_py(["a cat"], ["a dog"])
    assert spice_py.parse.cache_info().misses == 2


def test_synonyms_and_number_count_as_in_spice():
    spice_py = SpicePy()
    assert spice_py(["A kid rides a bike."], ["a child riding a bicycle"]) == [1.0]
    assert spice_py(["two dogs"], ["three dogs"]) == [0.5]


def test_agreement_with_spice_on_examples():
    """Two of twelve pairs differ, where the parser puts a preposition at the nearest noun; the module's docstring has
    the agreement on thousands of captions."""
    scores = np.array(SpicePy()([e.reference for e in EXAMPLES], [e.candidate for e in EXAMPLES]))
    spice = np.array([e.score for e in EXAMPLES])
    differences = np.abs(scores - spice)
    assert (differences > 1e-3).sum() <= 2
    assert differences.mean() < 0.03  # 0.028
    ranks = [np.argsort(np.argsort(values)) for values in (scores, spice)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95  # 0.986


def test_agreement_of_tuples_on_examples():
    """F1 of the parser's tuples with those of SPICE's rules, over all captions of the examples together."""
    same = ours = theirs = 0
    for example in EXAMPLES:
        for caption, text in (
            (example.reference, example.reference_tuples),
            (example.candidate, example.candidate_tuples),
        ):
            found = scene_tuples(caption)
            expected = {_renamed(entry) for entry in text.split(";")}
            same, ours, theirs = same + len(found & expected), ours + len(found), theirs + len(expected)
    assert 2 * same / (ours + theirs) > 0.95  # 0.967


def _renamed(entry):
    return tuple(SYNONYMS.get(part, part) for part in entry.split(","))
