"""Caption similarity by SPICE's definition (Anderson et al. 2016): F1 over the tuples of two scene graphs."""

import math
from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet

TupleParser = Callable[[str], AbstractSet[Hashable]]


def tuple_f1(reference: AbstractSet[Hashable], candidate: AbstractSet[Hashable]) -> float:
    """F1 of exactly matched tuples, in [0, 1]: 0 without a match, NaN when the reference names nothing.

    SPICE also matches WordNet synonyms; a parser that wants that maps synonyms to one name.
    """
    if not reference:
        return math.nan
    return 2 * len(reference & candidate) / (len(reference) + len(candidate))


class TupleSimilarity:
    """`tuple_f1` of captions, with a parser for the task's own language."""

    range = (0.0, 1.0)

    def __init__(self, parse: TupleParser) -> None:
        self.parse = parse

    def __call__(self, references: list[str], candidates: list[str]) -> list[float]:
        parsed = {caption: self.parse(caption) for caption in {*references, *candidates}}
        pairs = zip(references, candidates, strict=True)
        return [tuple_f1(parsed[reference], parsed[candidate]) for reference, candidate in pairs]
