"""Text-image matching (TIM) by the policy's own token states (CoRL, arXiv 2505.17534, section 3.2)."""

from typing import Protocol

import torch
from torch.nn.functional import normalize

from fastcorl.records import Rollout


class Matcher(Protocol):
    def match_states(
        self, pixels: torch.Tensor, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (n, 3, H, W) in [0, 1], n captions -> image states (n, T, D), text states (n, L, D), mask (n, L)."""
        ...


def match_score(image_states: torch.Tensor, text_states: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """Two-way best-match cosine of image (n, T, D) and text (n, L, D) states -> (n,) float32 in [-1, 1].

    Text positions where `text_mask` (n, L) is False do not exist; a row without text is NaN.
    """
    cosine = normalize(image_states.float(), dim=-1) @ normalize(text_states.float(), dim=-1).transpose(1, 2)
    image_to_text = cosine.masked_fill(~text_mask[:, None], -torch.inf).amax(dim=2).mean(dim=1)
    best_image = cosine.amax(dim=1).masked_fill(~text_mask, 0)
    text_to_image = best_image.sum(dim=1) / text_mask.sum(dim=1)
    return (image_to_text + text_to_image) / 2


class TIMReward:
    """`match_score` of a row's drawing and its prompt's caption."""

    range = (-1.0, 1.0)

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        captions = [rollout.prompt_of(row).caption for row in range(rollout.num_rows)]
        return match_score(*self.matcher.match_states(rollout.images.pixels, captions))
