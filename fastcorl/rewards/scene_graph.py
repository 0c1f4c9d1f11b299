"""Caption similarity by SPICE's definition (Anderson et al. 2016): F1 over the tuples of two scene graphs."""

import math
from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet

import torch

from fastcorl.records import Rollout
from fastcorl.rewards.captioner import BlipCaptioner

TupleParser = Callable[[str], AbstractSet[Hashable]]


def tuple_f1(reference: AbstractSet[Hashable], candidate: AbstractSet[Hashable]) -> float:
    """F1 of exactly matched tuples, in [0, 1]: 0 without a match, NaN when the reference names nothing.

    SPICE also matches WordNet synonyms; a parser that wants that maps synonyms to one name.
    """
    if not reference:
        return math.nan
    return 2 * len(reference & candidate) / (len(reference) + len(candidate))


class CaptionReward:
    """Similarity of a prompt's caption and BLIP's caption of the drawing, in [0, 1]."""

    def __init__(self, captioner: BlipCaptioner, parse: TupleParser) -> None:
        self.captioner = captioner
        self.parse = parse

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        pixels = rollout.images.pixels
        references = [self.parse(prompt.caption) for prompt in rollout.prompts]
        scores = [
            tuple_f1(references[row // rollout.group_size], self.parse(caption))
            for row, caption in enumerate(self.captioner(pixels))
        ]
        return torch.tensor(scores, dtype=torch.float32, device=pixels.device)
