"""Base forms of English nouns and verbs by spelling rules and short lists, for the caption parser."""

from functools import lru_cache

from fastcorl.rewards.captions.words import (
    ED_WORDS,
    IRREGULAR_NOUNS,
    IRREGULAR_PARTICIPLES,
    NOT_PLURAL,
    PLURAL_WORDS,
    VERBS,
)

VOWELS = frozenset("aeiou")


@lru_cache(maxsize=65536)
def noun_lemma(word: str) -> tuple[str, bool]:
    """(singular, is it plural) of a lower-case noun: "buses" -> ("bus", True)."""
    if word in IRREGULAR_NOUNS:
        return IRREGULAR_NOUNS[word], True
    if word in PLURAL_WORDS:
        return word, True
    if len(word) < 4 and word not in ("tvs", "pcs") or not word.endswith("s") or word in NOT_PLURAL:
        return word, False
    if word.endswith(("ss", "us", "is")):
        return word, False
    if word.endswith("ies"):
        return word[:-3] + "y", True
    if word.endswith(("ches", "shes", "sses", "xes", "zzes")):
        return word[:-2], True
    if word.endswith("oes"):
        return word[:-2], True
    return word[:-1], True


@lru_cache(maxsize=65536)
def third_person_lemma(word: str) -> str | None:
    """The known verb of which `word` is the form with -s ("carries" -> "carry"), or None."""
    if not word.endswith("s") or len(word) < 4:
        return None
    stems = [word[:-1]]
    if word.endswith("es"):
        stems.append(word[:-2])
    if word.endswith("ies"):
        stems.append(word[:-3] + "y")
    return next((stem for stem in stems if stem in VERBS), None)


@lru_cache(maxsize=65536)
def stem_lemma(word: str, suffix: str) -> str:
    """The verb of a form with -ing or -ed: the first known verb among the possible stems, else the likeliest stem.

    "riding" -> "ride", "sitting" -> "sit", "carried" -> "carry".
    """
    stem = word.removesuffix(suffix)
    candidates = [stem, stem + "e"]
    if len(stem) > 2 and stem[-1] == stem[-2]:
        candidates.append(stem[:-1])
    if suffix == "ed" and stem.endswith("i"):
        candidates.append(stem[:-1] + "y")
    if suffix == "ing" and stem.endswith("y"):
        candidates.append(stem[:-1] + "ie")
    for candidate in candidates:
        if candidate in VERBS:
            return candidate
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsz":
        return stem[:-1]
    if stem.endswith("i"):
        return stem[:-1] + "y"
    # "bake", "dance": one consonant after one vowel, or a soft c, g, or v, z, u
    if len(stem) > 2 and (
        stem[-1] in "cuvz" or (stem[-1] not in VOWELS | set("wxy") and stem[-2] in VOWELS and stem[-3] not in VOWELS)
    ):
        return stem + "e"
    return stem


def participle_lemma(word: str) -> str | None:
    """The verb of a past form ("parked" -> "park", "worn" -> "wear"), or None where `word` is none."""
    if word in IRREGULAR_PARTICIPLES:
        return IRREGULAR_PARTICIPLES[word]
    if word.endswith("ed") and len(word) > 3 and word not in ED_WORDS:
        return stem_lemma(word, "ed")
    return None
