"""Training batches of scenes as tensors."""

import random
from collections.abc import Iterator

import numpy as np
import torch

from fastcorl.quickstart.scenes import Scene, make_scene, render, sample_items


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
