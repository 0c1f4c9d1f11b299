"""The independent judge of quickstart drawings, never part of a reward: what GenEval does with a detector.

It reads each cell of a drawing: is it painted, which digit (an SVM fitted on all 1,797 glyphs; fitted on the train part
alone it reads 96.5 % of the held-out glyphs right), which colour.
"""

from functools import cache

import numpy as np
import torch

from fastcorl.quickstart.grammar import COLOURS, Item, parse_caption
from fastcorl.quickstart.scenes import CELL_SIZE, GLYPH_SIZE, IMAGE_SIZE, Split, glyphs

PAINTED = 0.04  # mean brightness of a cell; the faintest rendered digit has 0.06


def _placed(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Every glyph of a split at every place it can take in a cell: (m, 256) float32 and (m,) labels."""
    slack = CELL_SIZE - GLYPH_SIZE
    cells, labels = [], []
    for digit, stack in glyphs(split).items():
        for top in range(slack + 1):
            for left in range(slack + 1):
                cell = np.zeros((len(stack), CELL_SIZE, CELL_SIZE), np.float32)
                cell[:, top : top + GLYPH_SIZE, left : left + GLYPH_SIZE] = stack
                cells.append(cell.reshape(len(stack), -1))
                labels += [digit] * len(stack)
    return np.concatenate(cells), np.array(labels)


@cache
def digit_classifier():
    """An RBF SVM from a cell's brightness to its digit, fitted on every glyph at every place in the cell."""
    from sklearn.svm import SVC

    cells, labels = zip(_placed("train"), _placed("held_out"), strict=True)
    return SVC(C=10.0, gamma="scale").fit(np.concatenate(cells), np.concatenate(labels))


def read(pixels: torch.Tensor) -> list[tuple[Item, ...]]:
    """What stands in each of (n, 3, 32, 32) drawings with values in [0, 1]: items in reading order."""
    n = len(pixels)
    if pixels.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"the quickstart's scorer reads (n, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(pixels.shape)}")
    per_side = IMAGE_SIZE // CELL_SIZE
    cells = pixels.float().cpu().view(n, 3, per_side, CELL_SIZE, per_side, CELL_SIZE)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(n, per_side**2, 3, CELL_SIZE, CELL_SIZE).numpy()
    # A glyph's colour scales its brightness; dividing by the colour's peak brings every colour to the same range.
    brightness = cells.max(2)
    painted = brightness.mean((2, 3)) > PAINTED
    items: list[list[Item]] = [[] for _ in range(n)]
    image_index, cell_index = painted.nonzero()
    if len(image_index) == 0:
        return [() for _ in range(n)]
    grey = brightness[image_index, cell_index]
    grey = grey / np.maximum(grey.max((1, 2), keepdims=True), 1e-6)
    digits = digit_classifier().predict(grey.reshape(len(grey), -1))
    names = list(COLOURS)
    directions = np.array([COLOURS[name] for name in names])
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    mean_colour = cells[image_index, cell_index].mean((2, 3))
    colours = (mean_colour @ directions.T).argmax(1)
    for image, cell, digit, colour in zip(image_index, cell_index, digits, colours, strict=True):
        items[image].append(Item(int(digit), names[colour], int(cell)))
    return [tuple(found) for found in items]


class Scorer:
    """Scores drawings against captions; every figure is a fraction in [0, 1].

    `digit`, `colour`: of the asked items, those with a painted cell whose digit or colour is right. `position`: the
    painted cells are exactly the asked ones. `count`: as many painted cells as asked items. `overall`: the whole scene
    is right.
    """

    def __call__(self, captions: list[str], pixels: torch.Tensor) -> dict[str, float]:
        totals = {"digit": 0.0, "colour": 0.0, "position": 0.0, "count": 0.0, "overall": 0.0}
        num_items = 0
        for caption, found in zip(captions, read(pixels), strict=True):
            asked = parse_caption(caption)
            by_cell = {item.cell: item for item in found}
            num_items += len(asked)
            for item in asked:
                seen = by_cell.get(item.cell)
                totals["digit"] += seen is not None and seen.digit == item.digit
                totals["colour"] += seen is not None and seen.colour == item.colour
            totals["position"] += set(by_cell) == {item.cell for item in asked}
            totals["count"] += len(found) == len(asked)
            totals["overall"] += set(found) == set(asked)
        per_item = ("digit", "colour")
        return {
            name: value / max(1, num_items if name in per_item else len(captions)) for name, value in totals.items()
        }
