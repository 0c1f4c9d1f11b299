"""What flows between the parts of a training step: Prompt -> Rollout -> Scores -> PackedBatch -> StepRecord.

Rows of a rollout are prompt-major: row `i` belongs to prompt `i // group_size`. In the unified stage row `i` is a pair,
a drawing and an answer, that shares one reward and one advantage (CoRL, arXiv 2505.17534, section 3.3).
Shape legend: P prompts, G group size, n = P * G rows, T tokens per image, N packed positions, S packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One training example: draw `caption`, answer `question` about `image`.

    `question_type` is "MC" (multiple choice) or "OE" (open-ended); `solution` holds `<answer>...</answer>`.
    `pair_similarity`, in [0, 1], says how well caption and question belong together (PairUni, arXiv 2510.25682).
    """

    id: str
    caption: str
    image: Image
    question: str
    solution: str
    question_type: str
    pair_similarity: float = 1.0


@dataclass
class ImageSamples:
    """Sampled drawings. `log_probs` are those of the sampled (guided, tempered) distribution, `cond_log_probs` those of
    the conditional branch alone at the same temperature; equal when guidance is 1."""

    tokens: torch.Tensor  # (n, T) int64
    log_probs: torch.Tensor  # (n, T) float32
    cond_log_probs: torch.Tensor  # (n, T) float32
    pixels: torch.Tensor  # (n, 3, H, W) float32 in [0, 1]


@dataclass
class TextSamples:
    """Sampled answers, right-padded; the end token, when one was drawn, is part of the answer."""

    tokens: torch.Tensor  # (n, L) int64
    lengths: torch.Tensor  # (n,) int64
    log_probs: torch.Tensor  # (n, L) float32, 0 beyond the length
    answers: list[str]
    finished: torch.Tensor  # (n,) bool, False where the answer was cut at the limit


@dataclass
class Rollout:
    """Everything sampled in one step by one rank; either modality may be absent."""

    prompts: list[Prompt]
    group_size: int
    images: ImageSamples | None
    texts: TextSamples | None
    draw_ids: list[list[int]]  # per prompt: token ids of the drawing prompt, ends with the begin-of-image token
    uncond_ids: list[list[int]]  # per prompt: the drawing prompt of the unconditional branch, of the same length
    ask_ids: list[list[int]]  # per prompt: token ids of the question prompt, with image placeholders
    image_token_id: int  # the placeholder
    vision_features: torch.Tensor | None = None  # (P, T_vision, hidden), of the real images
    num_external: int = 0  # last rows of each group that come from the data; their log-probs are NaN

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.group_size

    @property
    def device(self) -> torch.device:
        return (self.images or self.texts).tokens.device

    def external_rows(self) -> torch.Tensor:
        """(n,) bool."""
        return torch.arange(self.num_rows) % self.group_size >= self.group_size - self.num_external

    def prompt_of(self, row: int) -> Prompt:
        return self.prompts[row // self.group_size]


@dataclass
class Scores:
    """Rewards of a rollout. A NaN marks a row that could not be scored: its advantage is 0 and it is counted."""

    total: torch.Tensor  # (n,) float32
    parts: dict[str, torch.Tensor]  # each (n,) float32, before weighting
    weights: dict[str, float] = field(default_factory=dict)  # of the parts that make up the total, none of them 0
    failures: dict[str, str] = field(default_factory=dict)  # rewards that could not be computed, and why


@dataclass
class LossRows:
    """The positions of one modality that carry loss, in sequence order.

    Row `r` predicts `targets[r]` from the hidden state at packed position `positions[r]`, which is the position
    before the target's own.
    """

    positions: torch.Tensor  # (R,) int64 into the pack
    targets: torch.Tensor  # (R,) int64
    cu_seqlens: torch.Tensor  # (S_m + 1,) int32 over the R rows
    rows: torch.Tensor  # (S_m,) int64: which row of the rollout each sequence is of
    advantages: torch.Tensor | None = None  # (S_m,) float32, once they are known
    old_log_probs: torch.Tensor | None = None  # (R,) float32; None means the policy's own
    ref_log_probs: torch.Tensor | None = None  # (R,) float32
    sampled_log_probs: torch.Tensor | None = None  # (R,) float32, as captured while sampling
    uncond_positions: torch.Tensor | None = None  # (R,) int64, with guidance in the policy
    external: torch.Tensor | None = None  # (S_m,) bool, sequences that come from the data; None means none


@dataclass
class PackedBatch:
    """One micro-batch: sequences of both modalities behind one another, no padding.

    With shared prefixes a group's prompt is a sequence of its own, and each completion a sequence that continues it.
    `token_ids[p]` is a text id, an image code (at `code_positions`) or a placeholder (at `vision_positions`). What says
    how the sequences lie is on the CPU, where it is read: a forward need not wait for the one before it.
    """

    token_ids: torch.Tensor  # (N,) int64
    code_positions: torch.Tensor  # (C,) int64: where image codes stand
    position_ids: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int32, on the CPU
    vision_positions: torch.Tensor  # (M,) int64: where image features stand
    vision_rows: torch.Tensor  # (M,) int64: which row of the flattened features stands there
    vision_features: torch.Tensor | None  # (rows, hidden)
    image: LossRows | None
    text: LossRows | None
    prefixes: torch.Tensor | None = None  # (S,) int64, on the CPU: the sequence that each one continues, or -1

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())


@dataclass
class StepRecord:
    """One line of metrics.jsonl. Units: seconds, GiB; `tokens` and `images` are sampled ones, over all ranks; `rewards`
    are means over rows. With several updates per rollout loss and gradient norm are the last one's."""

    stage: str
    step: int  # within the stage, from 1
    total_steps: int
    rewards: dict[str, float]
    metrics: dict[str, float]  # loss, kl, entropy, grad_norm, learning_rate, mismatch, ...
    seconds: dict[str, float]  # per phase
    tokens: int
    images: int
    memory_gib: float
    scores: dict[str, float] = field(default_factory=dict)  # held-out scores, on evaluation steps

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())
