"""Scenes of one to three coloured handwritten digits on a 2 x 2 grid, 32 x 32 pixels, from scikit-learn's digits."""

import random
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fastcorl.quickstart.grammar import COLOURS, Item, Question, ask, caption

IMAGE_SIZE = 32
CELL_SIZE = 16
GLYPH_SIZE = 14
NUM_TRAIN_DIGITS = 1347  # of 1,797; the last 450 are held out of every training
COUNT_WEIGHTS = (0.5, 0.35, 0.15)

Split = Literal["train", "held_out"]


class Scene(NamedTuple):
    """A drawn scene with its caption and one question; `image` is (32, 32, 3) uint8."""

    items: tuple[Item, ...]
    image: np.ndarray
    caption: str
    question: Question


@cache
def glyphs(split: Split) -> dict[int, np.ndarray]:
    """Handwritten glyphs by digit, each (n, 14, 14) float32 in [0, 1]; the two splits share no glyph."""
    from sklearn.datasets import load_digits

    data = load_digits()
    part = slice(None, NUM_TRAIN_DIGITS) if split == "train" else slice(NUM_TRAIN_DIGITS, None)
    images, labels = data.images[part], data.target[part]
    size = (GLYPH_SIZE, GLYPH_SIZE)
    big = np.stack(
        [
            np.asarray(
                Image.fromarray((image / 16).astype(np.float32), mode="F").resize(size, Image.Resampling.BICUBIC)
            )
            for image in images
        ]
    ).clip(0, 1)
    return {digit: big[labels == digit] for digit in range(10)}


def render(items: tuple[Item, ...], rng: random.Random, split: Split) -> np.ndarray:
    """Paint `items` on black with a random glyph each, moved inside its cell by up to two pixels."""
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    for item in items:
        pool = glyphs(split)[item.digit]
        glyph = pool[rng.randrange(len(pool))]
        slack = CELL_SIZE - GLYPH_SIZE
        top = (item.cell // 2) * CELL_SIZE + rng.randint(0, slack)
        left = (item.cell % 2) * CELL_SIZE + rng.randint(0, slack)
        canvas[top : top + GLYPH_SIZE, left : left + GLYPH_SIZE] = glyph[..., None] * COLOURS[item.colour]
    return (canvas * 255).round().astype(np.uint8)


def sample_items(rng: random.Random, max_items: int = 3) -> tuple[Item, ...]:
    """Items of a random scene in reading order; one to `max_items`, fewer more often."""
    count = rng.choices(range(1, max_items + 1), COUNT_WEIGHTS[:max_items])[0]
    cells = sorted(rng.sample(range(4), count))
    return tuple(Item(rng.randrange(10), rng.choice(list(COLOURS)), cell) for cell in cells)


def make_scene(seed: int, index: int, split: Split, kind: str | None = None) -> Scene:
    """Scene number `index` of a stream; `kind` fixes the question type, otherwise MC and OE alternate by chance."""
    rng = random.Random(f"{split}/{seed}/{index}")
    items = sample_items(rng)
    image = render(items, rng, split)
    return Scene(items, image, caption(items), ask(items, rng, kind or rng.choice(("MC", "OE"))))
