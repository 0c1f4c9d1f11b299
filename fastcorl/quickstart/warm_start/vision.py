"""Teaches a vision tower to read digits, before any language."""

import random

import torch
import torch.nn.functional as F

from fastcorl.quickstart.grammar import COLOURS, Item
from fastcorl.quickstart.scenes import render
from fastcorl.quickstart.warm_start.batches import disturb, to_pixels
from fastcorl.quickstart.warm_start.descent import Descent

CELLS_PER_SIDE = 2


def train_vision(tower: torch.nn.Module, *, steps: int, batch_size: int = 64, seed: int = 0, log=print) -> None:
    """Train `tower` in place on scenes with all four cells filled; every patch names its cell's digit and colour.

    `tower(pixels).last_hidden_state` ends in one state per patch, row by row; a class token may stand before them.
    Captions and answers alone teach so small a tower digits only after very many steps.
    """
    colours = list(COLOURS)
    width, side = tower.config.hidden_size, tower.config.image_size // tower.config.patch_size
    cell = side // CELLS_PER_SIDE
    torch.manual_seed(seed)
    heads = torch.nn.ModuleList(torch.nn.Linear(width, classes) for classes in (10, 10, len(colours)))
    mean_head, digit_head, colour_head = heads
    descent = Descent(
        "vision", [*tower.parameters(), *heads.parameters()], steps=steps, peak_learning_rate=1e-3, log=log
    )
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    for step in range(steps):
        scenes = [
            tuple(Item(rng.randrange(10), rng.choice(colours), place) for place in range(CELLS_PER_SIDE**2))
            for _ in range(batch_size)
        ]
        pixels = to_pixels([render(items, rng, "train") for items in scenes])
        # Undisturbed at first: the first digits are hard enough.
        states = tower(disturb(pixels, generator) if step > steps // 2 else pixels).last_hidden_state
        grid = states[:, -side * side :].unflatten(1, (CELLS_PER_SIDE, cell, CELLS_PER_SIDE, cell))
        patches = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (batch, cells, patches of a cell, width)
        digits = torch.tensor([[item.digit for item in items] for items in scenes])
        names = torch.tensor([[colours.index(item.colour) for item in items] for items in scenes])
        # A cell's mean is where a digit is learnt first; naming it in every patch is what a decoder can read.
        mean_loss = F.cross_entropy(mean_head(patches.mean(2)).flatten(0, 1), digits.flatten())
        digit_loss = _loss_by_patch(digit_head(patches), digits)
        colour_loss = _loss_by_patch(colour_head(patches), names)
        loss = mean_loss + digit_loss + colour_loss
        descent.step(loss, digits_by_cell=mean_loss, digits_by_patch=digit_loss)


def _loss_by_patch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (batch, cells, patches, classes) logits to the cells' (batch, cells) labels."""
    return F.cross_entropy(logits.permute(0, 3, 1, 2), labels[..., None].expand(logits.shape[:3]))
