"""An approximation of SPICE in Python alone: a rule-based parser, a short list of synonyms, and the F1 of tuples.

How near it comes, measured on public figures of SPICE itself:

- Flickr8k's expert captions, with five references each, scores of the FACTUAL parser's authors; 2,661 were looked at
  while the rules were written, these are the other 3,003: mean absolute difference 0.008 where SPICE's mean is 0.050,
  rank correlation 0.94; in the 1,462 where SPICE is above 0, 0.015 of 0.103 and 0.87.
- Kendall's tau-c with those captions' human ratings, all 5,664: 0.48, SPICE 0.47.
- COCO's 1,000 example results: mean score 0.134, published 0.133.
- Synonyms alone, the same tuples of 3,000 pairs of COCO captions matched by SPICE's own classes: mean absolute
  difference 0.010 of 0.245, rank correlation 0.97.
"""

from functools import lru_cache

from fastcorl.rewards.captions.scene_graph import tuple_f1
from fastcorl.rewards.captions.scene_parser import scene_tuples

KEPT_CAPTIONS = 65536


class SpicePy:
    """F1 of the tuples of two captions; NaN for a reference without tuples, 0 for such a candidate.

    English captions in everyday words. Parses of distinct captions are kept.
    """

    range = (0.0, 1.0)

    def __init__(self) -> None:
        self.parse = lru_cache(maxsize=KEPT_CAPTIONS)(scene_tuples)

    def __call__(self, references: list[str], candidates: list[str]) -> list[float]:
        """Scores in [0, 1], pair by pair."""
        return [
            tuple_f1(self.parse(reference), self.parse(candidate))
            for reference, candidate in zip(references, candidates, strict=True)
        ]
