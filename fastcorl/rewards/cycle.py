"""The bidirectional cycle reward of CoRL (arXiv 2505.17534, section 3.2): does the drawing lead back to the example?"""

from collections.abc import Sequence
from typing import Protocol

import torch

from fastcorl.records import Rollout
from fastcorl.rewards.captions.captioner import Captioner
from fastcorl.rewards.scaling import to_unit


class CaptionSimilarity(Protocol):
    """How alike captions are; more is better."""

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value."""
        ...

    def __call__(self, references: list[str], candidates: list[str]) -> Sequence[float]:
        """One value per pair; NaN for a reference that says nothing."""
        ...


class CaptionReward:
    """Similarity of a prompt's caption and a captioner's caption of the drawing; the mean of several similarities, each
    mapped to [0, 1] first with `unit`."""

    def __init__(self, captioner: Captioner, similarities: Sequence[CaptionSimilarity], *, unit: bool = True) -> None:
        self.captioner = captioner
        self.similarities = similarities
        self.unit = unit

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """-> (n,) float32."""
        pixels = rollout.images.pixels
        references = [rollout.prompt_of(row).caption for row in range(rollout.num_rows)]
        candidates = self.captioner(pixels)
        scores = []
        for similarity in self.similarities:
            values = torch.tensor(similarity(references, candidates), dtype=torch.float32)
            scores.append(to_unit(values, similarity.range) if self.unit else values)
        return torch.stack(scores).mean(0).to(pixels.device)


def cycle_reward(perceptual: torch.Tensor, caption: torch.Tensor, *, halve: bool) -> torch.Tensor:
    """1 - LPIPS(real, drawn) and SPICE(caption, BLIP(drawn)), each (n,): their sum, or with `halve` their mean."""
    total = perceptual + caption
    return total / 2 if halve else total
