"""Training batches of scenes as tensors."""

import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from fastcorl.quickstart.scenes import IMAGE_SIZE, Scene, make_scene, render, sample_items


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """(n) uint8 (H, W, 3) images as (n, 3, H, W) float32 in [-1, 1], Janus's normalisation."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_batches(batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless (batch_size, 3, 32, 32) batches of train scenes."""
    rng = random.Random(f"images/{seed}")
    while True:
        yield to_pixels([render(sample_items(rng), rng, "train") for _ in range(batch_size)])


def scene_batches(batch_size: int, seed: int) -> Iterator[list[Scene]]:
    """Endless batches of train scenes with captions and questions; the stream differs from every data set's."""
    index = 0
    while True:
        yield [make_scene(1_000_003 + seed, index + offset, "train") for offset in range(batch_size)]
        index += batch_size


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale and shift (n, 3, H, W) images a little and add noise: drawings are less tidy than scenes."""
    n = len(pixels)
    angle, scale, shift = (torch.rand(n, k, generator=generator) * 2 - 1 for k in (1, 1, 2))
    cos, sin = torch.cos(0.12 * angle), torch.sin(0.12 * angle)
    size = 1 + 0.06 * scale
    rows = [torch.cat([cos * size, -sin * size], 1), torch.cat([sin * size, cos * size], 1)]
    matrix = torch.cat([torch.stack(rows, 1), (shift / (IMAGE_SIZE / 2)).unsqueeze(-1)], -1)
    moved = F.grid_sample(pixels + 1, F.affine_grid(matrix, pixels.shape, align_corners=False), align_corners=False) - 1
    return (moved + 0.05 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
