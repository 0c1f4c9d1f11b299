"""The words of a caption and their classes, decided by lists, endings and neighbours."""

import re
from dataclasses import dataclass

from fastcorl.rewards.captions import words
from fastcorl.rewards.captions.lemmas import noun_lemma, participle_lemma, stem_lemma, third_person_lemma

TOKEN = re.compile(r"[^\W_]+(?:[-.][^\W_]+)*|'s\b|[,.;:!?&()]")
MARKS = {"'s": "'", "&": "C", ",": ",", "(": ",", ")": ","}  # every other ends a clause


@dataclass(slots=True)
class Token:
    """A word. `tag` is D(eterminer), N(oun), J (adjective), Q (number), G (-ing), P(articiple), V (finite verb), B(e),
    A(uxiliary), I (preposition), R (adverb), C(onjunction), S(ubordinator), W (relative), T (to + verb),
    O (pronoun), F (possessive pronoun), E (there + be) or a mark."""

    text: str
    tag: str
    lemma: str
    plural: bool = False


START = Token(".", ".", ".")


@dataclass(slots=True)
class Clause:
    """What the words of the current clause have shown so far."""

    has_verb: bool = False
    plural: bool = False


def tokenize(caption: str) -> list[str]:
    """Lower-case words and marks; a preposition of several words is one token with spaces."""
    text = caption.lower().replace("’", "'").replace("can't", "can not").replace("n't", " not")
    tokens = TOKEN.findall(text)
    merged: list[str] = []
    position = 0
    while position < len(tokens):
        for length in (3, 2):
            if tuple(tokens[position : position + length]) in words.LONG_PREPOSITIONS:
                merged.append(" ".join(tokens[position : position + length]))
                position += length
                break
        else:
            merged.append(tokens[position])
            position += 1
    return merged


def _starts_noun_phrase(word: str) -> bool:
    return word in words.DETERMINERS or word in words.POSSESSIVES or word in words.NUMBERS


def _can_follow_preposition(word: str) -> bool:
    return _starts_noun_phrase(word) or _is_nounish(word) or word in words.PRONOUNS


def _ends_clause_part(word: str) -> bool:
    """Whether `word` can follow a finite verb: anything but what would make the verb a noun's modifier."""
    return (
        not word[:1].isalnum()
        or _starts_noun_phrase(word)
        or word in words.PREPOSITIONS
        or word in words.LONG_PREPOSITION_TEXTS
        or word in words.ADVERBS
        or word in words.PARTICLES
        or word in words.CONJUNCTIONS
        or word in words.SUBORDINATORS
        or word in words.PRONOUNS
        or word in ("to", "there")
        or (word.endswith("ing") and word not in words.ING_NOUNS)
    )


def tag(tokens: list[str]) -> list[Token]:
    """Tokens with their classes, decided from left to right."""
    tagged: list[Token] = []
    clause = Clause()
    for index, word in enumerate(tokens):
        before = tagged[-1] if tagged else START
        follower = tokens[index + 1] if index + 1 < len(tokens) else "."
        token = _tag_word(word, before, follower, clause)
        if token.tag in "VB":
            clause.has_verb = True
        elif token.tag in "CSW,.E":
            # subjects joined by "and" are one of many, whatever comes between
            joined = (token.tag == "C" and not clause.has_verb) or (token.tag == "," and clause.plural)
            clause = Clause(plural=joined)
        elif token.plural:
            clause.plural = True
        tagged.append(token)
    return tagged


def _tag_word(word: str, before: Token, follower: str, clause: Clause) -> Token:
    if not word[0].isalnum():
        return Token(word, MARKS.get(word, "."), word)
    if word in words.NUMBERS:
        number = words.NUMBERS[word]
        return Token(word, "D" if word == "one" and follower == "another" else "Q", number, number != "one")
    known = words.CLOSED.get(word)
    if known is None:
        return _tag_open_word(word, before, follower, clause)
    return Token(word, _tag_closed_word(word, known, before.tag, follower), words.LEMMAS.get(word, word))


def _tag_closed_word(word: str, known: str, previous: str, follower: str) -> str:
    """The class of a word that has few of them; `known` is the usual one."""
    match word:
        case "that":
            return "W" if previous == "N" and not _is_nounish(follower) else "D"
        case "there":
            return "E" if follower in words.BE or follower == "'s" else "R"
        case "her":
            return "F" if _is_nounish(follower) else "O"
        case "do" | "does" | "did":
            return "V" if _starts_noun_phrase(follower) or follower.endswith(("s", "stunt", "trick")) else "A"
        case "can" | "will" | "might":
            return "N" if previous in "DJF" else "A"
        case "to":
            verb = follower in words.VERBS and follower not in words.NOUN_FIRST and previous != "I"
            return "T" if verb or follower == "be" else "I"
        case "after" | "before":
            return "S" if follower.endswith("ing") else "I"
        case "out" if follower in words.PREPOSITIONS:
            return "R"
        case "nearby" if _is_nounish(follower):
            return "J"
        case "back" if previous in "DF":
            return "N"
    if known == "I" and word in words.PARTICLES and not _can_follow_preposition(follower):
        return "R"
    return known


def _is_nounish(word: str) -> bool:
    """Whether `word` may begin or be a noun phrase without a determiner."""
    return (
        word[0].isalnum()
        and word not in words.CLOSED
        and ((verb := third_person_lemma(word)) is None or verb in words.NOUN_FIRST)
        or word in words.POSSESSIVES
    )


def _tag_open_word(word: str, before: Token, follower: str, clause: Clause) -> Token:
    previous = before.tag
    noun, plural = noun_lemma(word)
    inside_phrase = previous in "DJFQ'"
    if word.endswith("ing") and len(word) > 4:
        if word in words.ING_NOUNS:
            is_verb = previous == "B" or (previous == "N" and _starts_noun_phrase(follower))
            if not is_verb:
                return Token(word, "N", word)
        lemma = stem_lemma(word, "ing")
        modifies = _is_nounish(follower) and (
            previous in "DJF'" or (previous == "I" and before.text in ("of", "with", "in", "on"))
        )
        return Token(word, "J" if modifies else "G", lemma)
    if word in words.ADJECTIVES:
        if inside_phrase and not _is_nounish(follower) and word in words.ALSO_NOUNS:
            return Token(word, "N", noun, plural)
        return Token(word, "J", word)
    if word.endswith(("ful", "ous", "able", "less", "ish", "iest")) and len(word) > 5:
        return Token(word, "J", word)
    participle = participle_lemma(word)
    if participle is not None and word not in words.IRREGULAR_NOUNS:
        return _tag_participle(word, participle, before, follower, clause)
    after_noun = previous == "N" and follower in ("into", "for", "up", "out", "in")
    if word in words.UNCHANGED_PARTICIPLES and (previous == "B" or after_noun):
        return Token(word, "P", word)
    if previous in "TA":
        return Token(word, "T", word) if word in words.VERBS else Token(word, "N", noun, plural)
    third = third_person_lemma(word)
    if third is not None and previous != "I" and _is_third_person(third, before, follower, clause):
        return Token(word, "V", third)
    if word in words.VERBS and not inside_phrase and previous != "I" and _is_plain_form(word, before, follower, clause):
        return Token(word, "V", word)
    if word.endswith("ly") and len(word) > 4 and word not in words.LY_WORDS:
        return Token(word, "R", word)
    return Token(word, "N", noun, plural)


def _is_third_person(lemma: str, before: Token, follower: str, clause: Clause) -> bool:
    """Whether a form with -s that could be a plural noun is the verb of a singular subject."""
    if lemma in words.NEVER_FINITE:
        return False
    if before.text in ("one", "another"):
        return _ends_clause_part(follower)
    sure = lemma not in words.NOUN_FIRST
    if before.tag in "DJFQ'" or before.tag not in "NWORC" or (clause.has_verb and before.tag == "N"):
        return False
    if before.tag == "C" and not sure:
        return False
    return (_ends_clause_part(follower) or (sure and not before.plural)) and (sure or not before.plural)


def _is_plain_form(word: str, before: Token, follower: str, clause: Clause) -> bool:
    """Whether a word that could be a singular noun is the verb of a plural subject."""
    many = before.tag in "NQJ" and clause.plural
    if clause.has_verb:
        return word not in words.NOUN_FIRST and before.tag in "CR" and _ends_clause_part(follower)
    if word in words.NOUN_FIRST:
        return many and before.plural and _ends_clause_part(follower)
    return many or (before.tag in "WCR" and _ends_clause_part(follower))


def _tag_participle(word: str, lemma: str, before: Token, follower: str, clause: Clause) -> Token:
    previous = before.tag
    if _is_nounish(follower) and (
        previous in "DJFQ.CI,'"
        or (previous == "N" and not before.plural and word.endswith("ed") and follower not in words.ADJECTIVES)
    ):
        return Token(word, "J", lemma if lemma in words.VERBS else word)
    if previous in "DF":
        return Token(word, "J", word)
    if word in words.PAST_ONLY and previous in "NWOR" and not clause.has_verb:
        return Token(word, "V", lemma)
    return Token(word, "P", lemma)
