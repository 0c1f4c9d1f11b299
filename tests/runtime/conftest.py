"""Made-up steps and rollouts that look like the quickstart's."""

import math
import random

import pytest
import torch
from PIL import Image

from fastcorl.quickstart.scenes import make_scene
from fastcorl.records import ImageSamples, Prompt, Rollout, Scores, StepRecord, TextSamples

REWARDS = {
    "unified": ("cycle", "tim", "accuracy", "format"),
    "t2i": ("cycle", "tim"),
    "mc": ("accuracy", "format"),
    "oe": ("accuracy", "format"),
}


def make_record(stage: str = "unified", step: int = 1, total: int = 40, **changes) -> StepRecord:
    rng = random.Random(f"{stage}/{step}")
    done = step / total
    parts = {name: rng.gauss(0.3 + 0.1 * len(name) / 8 + 0.35 * math.sqrt(done), 0.06) for name in REWARDS[stage]}
    fields = {
        "stage": stage,
        "step": step,
        "total_steps": total,
        "rewards": {**parts, "total": sum(parts.values())},
        "metrics": {
            "loss": rng.gauss(0.0, 0.01),
            "kl_image": 0.02 * done * rng.uniform(0.7, 1.3),
            "kl_text": 0.05 * done * rng.uniform(0.7, 1.3),
            "entropy_image": 4.1 - 0.5 * done + rng.gauss(0, 0.05),
            "entropy_text": 0.6 - 0.2 * done + rng.gauss(0, 0.03),
            "grad_norm": rng.uniform(0.4, 1.6),
            "learning_rate": 4e-6,
        },
        "seconds": {
            "rollout": rng.uniform(0.9, 1.2),
            "score": 0.12,
            "pack": 0.02,
            "reference": 0.0 if stage == "unified" else 0.35,
            "update": rng.uniform(1.4, 1.7),
        },
        "tokens": 21_504,
        "images": 0 if stage in ("mc", "oe") else 128,
        "memory_gib": 1.53,
    }
    return StepRecord(**fields | changes)


@pytest.fixture
def record():
    """Factory of one step of a run."""
    return make_record


def make_rollout(
    prompts: int = 3, group_size: int = 8, size: int = 32, images: bool = True, texts: bool = True
) -> tuple[Rollout, Scores]:
    scenes = [make_scene(0, index, "train") for index in range(prompts)]
    big = [Image.fromarray(scene.image).resize((size, size), Image.Resampling.BICUBIC) for scene in scenes]
    rows = prompts * group_size
    noise = torch.Generator().manual_seed(0)
    drawn = [torch.frombuffer(bytearray(big[row // group_size].tobytes()), dtype=torch.uint8) for row in range(rows)]
    pixels = torch.stack([one.reshape(size, size, 3).permute(2, 0, 1) / 255 for one in drawn])
    pixels = (pixels + 0.15 * torch.randn(pixels.shape, generator=noise)).clamp(0, 1)
    zeros = torch.zeros(rows, 64)
    answers = [scenes[row // group_size].question.solution for row in range(rows)]
    rollout = Rollout(
        prompts=[
            Prompt(f"train-{i}", s.caption, image, s.question.problem, s.question.solution, s.question.kind)
            for i, (s, image) in enumerate(zip(scenes, big, strict=True))
        ],
        group_size=group_size,
        images=ImageSamples(zeros.long(), zeros, zeros, pixels) if images else None,
        texts=TextSamples(zeros.long(), zeros[:, 0].long(), zeros, answers, torch.arange(rows) % 5 > 0)
        if texts
        else None,
        draw_ids=[[0]] * prompts,
        uncond_ids=[[0]] * prompts,
        ask_ids=[[0]] * prompts,
        image_token_id=1,
    )
    parts = {name: torch.rand(rows, generator=noise) for name in ("cycle", "tim", "accuracy", "format")}
    total = torch.stack(list(parts.values())).sum(0)
    total[1] = math.nan
    return rollout, Scores(total, parts)


@pytest.fixture
def rollout():
    """Factory of a rollout with its scores; row 1 could not be scored."""
    return make_rollout
