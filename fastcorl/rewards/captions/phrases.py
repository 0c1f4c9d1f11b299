"""From the tagged words of a caption to its phrases: noun phrases whole, other words one by one."""

from dataclasses import dataclass, field

from fastcorl.rewards.captions import words
from fastcorl.rewards.captions.tags import Token


@dataclass(slots=True)
class Phrase:
    """A noun phrase (`kind` N), where `tuples` are what it says of its head, or one other word under its own tag."""

    kind: str
    lemma: str
    plural: bool = False
    tuples: list[tuple[str, ...]] = field(default_factory=list)
    possessor: str | None = None  # a possessive pronoun


def phrases(tokens: list[Token]) -> list[Phrase]:
    """Noun phrases as one phrase each, in order among the other words; adverbs and determiners go."""
    result: list[Phrase] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token.tag in "DJNQF":
            phrase, position = _noun_phrase(tokens, position)
            if phrase is not None:
                result.append(phrase)
            continue
        if token.tag == "'":
            result.append(Phrase("'" if result and result[-1].kind == "N" else "B", "be"))
        elif token.tag == "R":
            if token.text in words.PARTICLES:
                result.append(Phrase("R", token.text))
        else:
            result.append(Phrase(token.tag, token.lemma, token.plural))
        position += 1
    return result


def _measured(tokens: list[Token], position: int) -> Token | None:
    """The measure at `position` of something named next ("couple" of "a couple of dogs", "lots" of "lots of food")."""
    if _tag_at(tokens, position) == "D":
        position += 1
        if tokens[position - 1].text not in ("a", "an") or _tag_at(tokens, position) != "N":
            return None
        known = words.MEASURES
    else:
        known = words.PLURAL_MEASURES
    if position + 1 >= len(tokens) or tokens[position].text not in known or tokens[position + 1].text != "of":
        return None
    return tokens[position] if _tag_at(tokens, position + 2) in "DJNQFG" else None


def _noun_phrase(tokens: list[Token], start: int) -> tuple[Phrase | None, int]:
    """The noun phrase at `start` and where it ends; an adjective phrase (kind J) where no noun follows."""
    position = start
    possessor = None
    number = measure = _measured(tokens, start)
    if measure is not None:
        position += 3 if tokens[start].tag == "D" else 2
    modifiers: list[Token] = []
    while position < len(tokens) and tokens[position].tag in "DFQ":
        token = tokens[position]
        if token.tag == "F":
            possessor = token.text
        elif token.tag == "Q":
            number = token
        position += 1
    nouns: list[Token] = []
    while position < len(tokens):
        token = tokens[position]
        if token.tag == "J" and not nouns:
            modifiers.append(token)
        elif token.tag == "J" and nouns and _leads_to_noun(tokens, position + 1):
            modifiers += [*nouns, token]
            nouns = []
        elif token.tag == "N":
            nouns.append(token)
        elif token.tag == "Q" and not nouns:
            number = token
        elif token.tag == "R" and _tag_at(tokens, position + 1) == "J" and not nouns:
            pass  # "a very large dog"
        elif modifiers and not nouns and token.tag in "C," and _adjectives_to_noun(tokens, position + 1):
            pass  # "black and white dog"
        else:
            break
        position += 1
    if not nouns and modifiers and _names_something(tokens, start, position, modifiers[-1]):
        nouns = [modifiers.pop()]
    if not nouns:
        if modifiers:
            return Phrase("J", modifiers[-1].lemma), position
        if number is not None:
            return Phrase("O", number.lemma), position
        if position == start:
            return None, start + 1
        return (Phrase("O", tokens[position - 1].text), position) if possessor is None else (None, position)
    head = nouns[-1]
    tuples: list[tuple[str, ...]] = [(head.lemma,)]
    tuples += [(head.lemma, token.lemma) for token in [*modifiers, *nouns[:-1]]]
    if measure is not None and measure.tag == "N":
        tuples.append((measure.lemma,))
    if number is not None and head.plural:
        tuples.append((head.lemma, number.lemma))
    return Phrase("N", head.lemma, head.plural, tuples, possessor), position


def _names_something(tokens: list[Token], start: int, position: int, last: Token) -> bool:
    """Whether adjectives without a noun stand for one: "in black", "the public"."""
    if last.text in ("other", "each", "same", "more") or last.text.endswith("ing"):
        return False
    if last.text in words.COLOURS:
        return _tag_at(tokens, start - 1) == "I"
    return tokens[start].tag in "DF" and _tag_at(tokens, position) != ","


def _tag_at(tokens: list[Token], position: int) -> str:
    return tokens[position].tag if 0 <= position < len(tokens) else "."


def _leads_to_noun(tokens: list[Token], position: int) -> bool:
    while _tag_at(tokens, position) == "J":
        position += 1
    return _tag_at(tokens, position) == "N"


def _adjectives_to_noun(tokens: list[Token], position: int) -> bool:
    """Whether adjectives from `position` on lead to a noun: "and white dog"."""
    if _tag_at(tokens, position) == "C":
        position += 1
    seen = False
    while _tag_at(tokens, position) == "J":
        seen = True
        position += 1
    return seen and _tag_at(tokens, position) in "NC,"
