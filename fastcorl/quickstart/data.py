"""The quickstart's rows, with the columns of the paper's unified data set."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from fastcorl.quickstart.scenes import Split, make_scene

TRAIN_ROWS = 2048
HELD_OUT_ROWS = 512


class SceneRows(Sequence[dict[str, Any]]):
    """Rows of scenes, drawn when first asked for: prompt, real_image, qa_problem, qa_solution, qa_type."""

    def __init__(self, split: Split, size: int, seed: int = 0):
        self.split = split
        self.size = size
        self.seed = seed
        self._rows: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if index not in self._rows:
            self._rows[index] = self._draw(index)
        return self._rows[index]

    def _draw(self, index: int) -> dict[str, Any]:
        # Question types alternate, so every prefix of the rows has as many of each.
        scene = make_scene(self.seed, index, self.split, kind=("MC", "OE")[index % 2])
        return {
            "prompt": scene.caption,
            "real_image": Image.fromarray(scene.image),
            "qa_problem": scene.question.problem,
            "qa_solution": scene.question.solution,
            "qa_type": scene.question.kind,
        }


def train() -> SceneRows:
    """Training rows: scenes of the train glyphs."""
    return SceneRows("train", TRAIN_ROWS)


def held_out() -> SceneRows:
    """Evaluation rows: scenes of glyphs that no training has seen."""
    return SceneRows("held_out", HELD_OUT_ROWS)
