"""Drawings against the real image of their prompt: the interface of a similarity, and passes of bounded size."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from fastcorl.errors import UserError

Described = TypeVar("Described")
PIXELS_PER_PASS = 16 * 384 * 384


class ImageSimilarity(Protocol):
    """How alike drawings and real images are; more is better."""

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value."""
        ...

    def __call__(self, drawn: torch.Tensor, real: torch.Tensor, group_size: int) -> torch.Tensor:
        """Drawings (P * group_size, 3, H, W) and real images (P, 3, H, W), in [0, 1] -> (P * group_size,) float32.

        Row i is compared with real image i // group_size; a drawing with a NaN gives NaN. Without gradient.
        """
        ...


def compare_groups(
    drawn: torch.Tensor,
    real: torch.Tensor,
    group_size: int,
    *,
    describe: Callable[[torch.Tensor], Described],
    compare: Callable[[torch.Tensor, Described], torch.Tensor],
    pixels_per_pass: int,
) -> torch.Tensor:
    """Compare n = P * group_size drawings (n, 3, H, W) with real images (P, 3, H, W), pass by pass -> (n,) float32.

    `describe` turns k real images into features, once for each image. `compare` takes m drawings and the features of
    their k images, m / k rows each, to m values. A pass has at most `pixels_per_pass` pixels of drawings, or one row.
    """
    if len(drawn) != len(real) * group_size or drawn.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"drawings {tuple(drawn.shape)} are not {group_size} for each of the real images {tuple(real.shape)}"
        )
    rows_per_pass = max(1, pixels_per_pass // (drawn.shape[-2] * drawn.shape[-1]))
    prompts_per_pass = max(1, rows_per_pass // group_size)
    values = []
    for rows, images in zip(drawn.split(prompts_per_pass * group_size), real.split(prompts_per_pass), strict=True):
        features = describe(images)
        # several parts only where the rows of a single prompt are too many for one pass
        values += [compare(part, features) for part in rows.split(rows_per_pass)]
    return torch.cat(values).float()


def require_size(kind: str, pixels: torch.Tensor, smallest: int) -> None:
    """UserError where images (.., H, W) have a side shorter than `smallest` pixels."""
    height, width = pixels.shape[-2:]
    if min(height, width) < smallest:
        raise UserError(
            f"rewards.image_similarity: {kind} needs drawings of at least {smallest} x {smallest} pixels, and the "
            f"model's are {height} x {width}; choose another"
        )
