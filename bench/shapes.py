"""The one table of shapes: Janus-Pro's heads in bfloat16 on a GPU, small ones and the quickstart's in float32 on a CPU.

4608 rows are 8 drawn images of 576 tokens. A CPU shape of four times the rows shows what the memory grows with.
"""

from dataclasses import dataclass

import pytest
import torch


class OnDevice:
    """A shape with a `device`: bfloat16 on a GPU, float32 on a CPU."""

    @property
    def dtype(self):
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass(frozen=True)
class Shape(OnDevice):
    """Rows of ``sequences`` equally long sequences, and the head that they meet; ``kept`` is the mask's share."""

    rows: int
    vocabulary: int
    hidden: int = 0  # of the head; logits alone have none
    trained: bool = True  # whether the head's weight wants a gradient
    kept: float = 1.0
    sequences: int = 8
    device: str = "cpu"


@dataclass(frozen=True)
class RewardShape:
    """Rewards (``prompts * group_size``, ``columns``)."""

    prompts: int
    group_size: int
    columns: int
    device: str = "cpu"


TALL = "small, trained, 4 times the rows"
HEADS = {
    "small, trained": Shape(512, 16384, 256),
    "small, frozen": Shape(512, 16384, 256, trained=False),
    "small, trained, half masked": Shape(512, 16384, 256, kept=0.5),
    TALL: Shape(2048, 16384, 256),
    "quickstart text": Shape(1600, 383, 192),
    "quickstart image": Shape(4096, 256, 192, trained=False),
    "Janus-Pro-1B text": Shape(4608, 102400, 2048, device="cuda"),
    "Janus-Pro-1B text, half masked": Shape(4608, 102400, 2048, kept=0.5, device="cuda"),
    "Janus-Pro-1B image": Shape(4608, 16384, 2048, trained=False, device="cuda"),
    "Janus-Pro-7B text": Shape(4608, 102400, 4096, device="cuda"),
    "Janus-Pro-7B image": Shape(4608, 16384, 4096, trained=False, device="cuda"),
}

LOGITS = {
    "small": Shape(512, 16384),
    "small, half masked": Shape(512, 16384, kept=0.5),
    "quickstart text": Shape(1600, 383),
    "Janus-Pro text": Shape(4608, 102400, device="cuda"),
    "Janus-Pro image": Shape(4608, 16384, device="cuda"),
}

REWARDS = {
    "8 prompts of 8": RewardShape(8, 8, 4),
    "1024 prompts of 16": RewardShape(1024, 16, 4),
    "8 prompts of 8, GPU": RewardShape(8, 8, 4, device="cuda"),
    "1024 prompts of 16, GPU": RewardShape(1024, 16, 4, device="cuda"),
}


def parametrize(table):
    """A ``shape`` parameter for a benchmark: the names of ``table``, those on a GPU marked so."""
    marks = {"cpu": (), "cuda": pytest.mark.gpu}
    return pytest.mark.parametrize("shape", [pytest.param(n, marks=marks[s.device], id=n) for n, s in table.items()])
