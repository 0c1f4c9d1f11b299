"""Caption similarity by shared words, without a model."""

import math
from collections.abc import Callable
from string import punctuation

from fastcorl.rewards.answers.matching import soft_jaccard as soft_overlap


def word_set(text: str) -> set[str]:
    """Distinct words without case and the punctuation around them."""
    return {word for part in text.lower().split() if (word := part.strip(punctuation))}


def overlap(reference: str, candidate: str) -> float:
    """Jaccard index of two sets of words, in [0, 1]."""
    words, others = word_set(reference), word_set(candidate)
    union = words | others
    return len(words & others) / len(union) if union else 0.0


class WordSimilarity:
    """Scores captions pair by pair; NaN for a reference without words."""

    range = (0.0, 1.0)

    def __init__(self, score: Callable[[str, str], float]) -> None:
        """`score` takes a reference and a candidate."""
        self.score = score

    def __call__(self, references: list[str], candidates: list[str]) -> list[float]:
        pairs = zip(references, candidates, strict=True)
        return [self.score(*pair) if word_set(pair[0]) else math.nan for pair in pairs]


jaccard = WordSimilarity(overlap)
"""Jaccard index of the two sets of words: case and the punctuation around a word are no differences."""

soft_jaccard = WordSimilarity(lambda reference, candidate: soft_overlap(candidate, reference))
"""ULM-R1's soft Jaccard: words that are nearly alike, by `SequenceMatcher`, count in part; punctuation stays."""
