"""A rule-based parser from a caption to SPICE's tuples: objects, attributes, relations (Anderson et al. 2016).

It follows the rules by which SPICE reads dependency trees, with left-to-right attachment of phrases in place of a
statistical parser: nouns are objects; adjectives, numbers, parts of compounds, what a thing is said to be, and verbs
without an object are attributes; a verb with its subject or right behind its noun makes a relation of its object or
preposition, and so does a preposition between nouns. English only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from fastcorl.rewards.captions import words
from fastcorl.rewards.captions.phrases import Phrase, phrases
from fastcorl.rewards.captions.synonyms import SYNONYMS
from fastcorl.rewards.captions.tags import tag, tokenize

SceneTuple = tuple[str, ...]
Place = Callable[[str], None]  # adds the tuples of a noun that stands in this place

END = Phrase(".", ".")


def scene_tuples(caption: str) -> frozenset[SceneTuple]:
    """The tuples of a caption: (object,), (object, attribute) and (object, relation, object).

    Words are lower-case lemmas, synonyms under one name. Empty where the caption names nothing.
    """
    reader = _Reader(phrases(tag(tokenize(caption))))
    return frozenset(tuple(SYNONYMS.get(part, part) for part in entry) for entry in reader.read())


@dataclass(slots=True)
class _Predicate:
    """A verb that waits for its objects; `verb` is empty for "be"."""

    verb: str
    subjects: list[str]  # none where SPICE makes no tuple of the verb, as of infinitives
    finite: bool = False  # has a real subject, so that it says something even without an object
    passive: bool = False
    related: bool = False  # has found an object


@dataclass(slots=True)
class _Reader:
    items: list[Phrase]
    tuples: list[SceneTuple] = field(default_factory=list)
    first: Phrase | None = None  # the noun phrase that pronouns stand for
    subjects: list[str] = field(default_factory=list)  # of the clause
    nouns: list[str] = field(default_factory=list)  # the last noun phrase and those it was joined to
    agents: list[str] = field(default_factory=list)  # subjects of the last verb that had any
    predicate: _Predicate | None = None
    preposition: str | None = None
    place: Place | None = None  # where the last noun phrase went, for those joined to it by "and"

    def read(self) -> list[SceneTuple]:
        for index, item in enumerate(self.items):
            before = self.items[index - 1] if index else END
            after = self.items[index + 1 : index + 3]
            self._take(item, before, after)
        self._close_predicate()
        return self.tuples

    def _take(self, item: Phrase, before: Phrase, after: list[Phrase]) -> None:
        match item.kind:
            case "N":
                self._noun(item, before, after)
            case "O":
                for noun in self._antecedent(item.lemma)[:1] or [""]:
                    self._put(noun, joined=False)
            case "I":
                self.preposition = item.lemma
                # SPICE's graph keeps the noun inside these as an object
                self.tuples += [(noun,) for noun in ("front", "top") if noun in item.lemma.split()]
            case "B":
                self._begin(_Predicate("", list(self.subjects or self.nouns)))
            case "V":
                self._begin(_Predicate(item.lemma, list(self.subjects), finite=True))
            case "T":
                self._begin(_Predicate(item.lemma, []))
            case "G" | "P":
                self._begin(self._non_finite(item, before))
            case "J":
                self._adjective(item.lemma, before)
            case "R":
                if self.predicate is not None and before.kind in "VGP" and item.lemma in words.PARTICLES:
                    self.predicate.verb += " " + item.lemma
            case "W":
                self._begin(None)
                self.subjects = self.nouns[-1:]
            case "C":
                ahead = [phrase.kind for phrase in after]
                if ahead in (["N", "V"], ["N", "B"]) and self.predicate is not None and self.predicate.finite:
                    self._new_clause()
            case "." | "S" | "E":
                self._new_clause()

    def _new_clause(self) -> None:
        self._begin(None)
        self.subjects, self.nouns, self.place = [], [], None

    def _begin(self, predicate: _Predicate | None) -> None:
        self._close_predicate()
        self.predicate = predicate
        self.preposition = None

    def _close_predicate(self) -> None:
        """A verb that found no object says something of its subject: "a woman smiles" is (woman, smile)."""
        predicate = self.predicate
        if predicate is None:
            return
        if predicate.subjects:
            self.agents = predicate.subjects
        if predicate.finite and not predicate.related:
            self.tuples += [(subject, predicate.verb) for subject in predicate.subjects]

    def _non_finite(self, item: Phrase, before: Phrase) -> _Predicate:
        """The predicate of a form with -ing or a participle: after "be", after "and", or behind a noun."""
        last = self.predicate
        if last is not None and not last.verb and not last.related:
            passive = item.kind == "P"
            return _Predicate(item.lemma, last.subjects, finite=not passive, passive=passive)
        if before.kind == "C" and last is not None and last.verb:
            return _Predicate(item.lemma, last.subjects or self.agents, last.finite, last.passive)
        if before.kind in "NOR" and self.preposition is None:
            return _Predicate(item.lemma, self.nouns[-1:])
        return _Predicate(item.lemma, [])

    def _noun(self, item: Phrase, before: Phrase, after: list[Phrase]) -> None:
        if self.first is None:
            self.first = item
        self.tuples += item.tuples
        if item.possessor is not None and self.first is not item:
            self.tuples += [(owner, "have", item.lemma) for owner in self._antecedent(item.possessor)]
        joined = before.kind in "C," and bool(self.nouns)
        if before.kind == "'" and self.nouns:
            self.tuples.append((self.nouns.pop(), "have", item.lemma))
        if after and after[0].kind == "'":
            self.nouns = [*(self.nouns if joined else []), item.lemma]
        else:
            self._put(item.lemma, joined)

    def _antecedent(self, pronoun: str) -> list[str]:
        """The first noun of the caption, as SPICE resolves pronouns, where it agrees in number."""
        first = self.first
        if first is None or pronoun not in words.PERSONAL or (first.plural and pronoun in words.SINGULAR_PRONOUNS):
            return []
        return [first.lemma]

    def _put(self, noun: str, joined: bool) -> None:
        """Give a noun its place: behind a preposition, as an object, as what a thing is, or as the subject."""
        if joined:
            self.nouns.append(noun)
            if self.place is not None:
                self.place(noun)
            elif self.predicate is None:
                self.subjects.append(noun)
            return
        self.place = self._find_place()
        if self.place is None and self.predicate is None:
            self.subjects = [noun] if noun else []
        elif self.place is not None and noun:
            self.place(noun)
        self.nouns = [noun] if noun else []

    def _find_place(self) -> Place | None:
        predicate, preposition = self.predicate, self.preposition
        self.preposition = None
        if preposition is not None and (predicate is None or predicate.related):
            return self._relation(self.nouns[-1:], preposition)
        if predicate is None or (preposition is None and predicate.related and not predicate.verb):
            return None
        predicate.related = True
        if predicate.passive:
            return self._agent(predicate) if preposition == "by" else lambda noun: None
        if not predicate.verb and preposition is None:
            return lambda noun: self.tuples.extend((subject, noun) for subject in predicate.subjects)
        return self._relation(predicate.subjects, f"{predicate.verb} {preposition or ''}".strip())

    def _relation(self, subjects: list[str], relation: str) -> Place:
        return lambda noun: self.tuples.extend((subject, relation, noun) for subject in subjects if subject)

    def _agent(self, predicate: _Predicate) -> Place:
        return lambda noun: self.tuples.extend((noun, predicate.verb, subject) for subject in predicate.subjects)

    def _adjective(self, lemma: str, before: Phrase) -> None:
        predicate = self.predicate
        if predicate is not None and not predicate.verb:
            predicate.related = True
            self.tuples += [(subject, lemma) for subject in predicate.subjects]
        elif before.kind == "N" and self.nouns:
            self.tuples.append((self.nouns[-1], lemma))
