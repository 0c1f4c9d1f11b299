"""Similarities of pixels that CoRL compares with LPIPS (arXiv 2505.17534v3, table 5), from torchmetrics.

torchmetrics is imported where it is used: it is optional, and slow to import.
"""

import math

import torch

from fastcorl.errors import UserError
from fastcorl.rewards.images.groups import PIXELS_PER_PASS, compare_groups, require_size

MAX_PSNR = 20 * math.log10(255)


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """SSIM (Wang et al. 2004, Gaussian window of sigma 1.5) of n pairs (n, 3, H, W) in [0, 1] -> (n,) in [-1, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images, others, data_range=1.0, reduction="none").clamp(-1, 1)


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Decibels of n pairs (n, 3, H, W) in [0, 1] -> (n,) in [0, MAX_PSNR].

    MAX_PSNR, 48.13, is an RMSE of one grey level in 255; closer and equal images have no more than that.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = peak_signal_noise_ratio(images, others, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(0, MAX_PSNR)


def mse(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 - MSE of n pairs (n, 3, H, W) in [0, 1] -> (n,) in [0, 1]."""
    return _one_minus_error(images, others, squared=True)


def rmse(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 - RMSE of n pairs (n, 3, H, W) in [0, 1] -> (n,) in [0, 1]: what CoRL's later public code has for LPIPS."""
    return _one_minus_error(images, others, squared=False)


def _one_minus_error(images: torch.Tensor, others: torch.Tensor, squared: bool) -> torch.Tensor:
    from torchmetrics.functional import mean_squared_error

    # one "output", that is one column, per pair; of a single column it returns a scalar
    columns, other_columns = images.flatten(1).T, others.flatten(1).T
    error = mean_squared_error(columns, other_columns, squared=squared, num_outputs=len(images))
    return (1 - error.reshape(len(images))).clamp(0, 1)


_RANGES = {ssim: (-1.0, 1.0), psnr: (0.0, MAX_PSNR), mse: (0.0, 1.0), rmse: (0.0, 1.0)}
PIXEL_MEASURES = {measure.__name__: measure for measure in _RANGES}
_SSIM_SMALLEST = 6  # its window is mirrored by 5 pixels at the border


class PixelSimilarity:
    """One of `PIXEL_MEASURES`, by name, as an `ImageSimilarity`."""

    def __init__(self, kind: str, pixels_per_pass: int = PIXELS_PER_PASS) -> None:
        """`pixels_per_pass` bounds the memory. Raises UserError where torchmetrics is not installed."""
        try:
            import torchmetrics.functional  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"rewards.image_similarity: {kind} needs torchmetrics ({error}); pip install 'fastcorl[rewards]'"
            ) from error
        self.kind = kind
        self.measure = PIXEL_MEASURES[kind]
        self.range = _RANGES[self.measure]
        self.pixels_per_pass = pixels_per_pass

    @torch.no_grad()
    def __call__(self, drawn: torch.Tensor, real: torch.Tensor, group_size: int) -> torch.Tensor:
        require_size(self.kind, drawn, _SSIM_SMALLEST if self.kind == "ssim" else 1)
        return compare_groups(
            drawn.float(),
            real.float(),
            group_size,
            describe=lambda images: images,
            compare=lambda rows, images: self.measure(rows, images.repeat_interleave(len(rows) // len(images), dim=0)),
            pixels_per_pass=self.pixels_per_pass,
        )
