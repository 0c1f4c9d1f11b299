"""The trainer with a record of its steps, and a death where one is asked for; the options are train.py's.

Every rank appends a line per step to rank-N.jsonl in the folder that RECORD names. DEATH is empty or PHASE STAGE STEP,
the phase as in `dying_run.PHASES`: there SIGKILL ends every process of the group, launcher and ranks.
"""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastcorl import train, trainer
from fastcorl.pipeline import Run
from fastcorl.trainer import Trainer
from tests.faults.dying_run import PHASES


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of every bit of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def step_line(engine: Any, result: tuple, advantages: torch.Tensor) -> dict:
    """What a rank sampled, was rewarded with and learnt in a step, drawings and answers row by row. A collective call
    under ZeRO 3."""
    record, rollout, scores = result
    images, texts = rollout.images, rollout.texts
    line = {
        "stage": record.stage,
        "step": record.step,
        "prompts": [prompt.id for prompt in rollout.prompts],
        "drawings": [],
        "answers": [],
        "advantages": digest([advantages]),
        "rewards": {name: digest([values]) for name, values in {"total": scores.total, **scores.parts}.items()},
        "weights": digest(weight for _, weight in engine.full_policy().trained_parameters()),
        "sampled": 0,
    }
    if images is not None:
        line["drawings"] = [digest([row]) for row in images.tokens]
        line["drawn_log_probs"] = digest([images.log_probs, images.cond_log_probs])
        line["sampled"] += images.tokens.numel()
    if texts is not None:
        rows = zip(texts.tokens, texts.lengths, strict=True)
        line["answers"] = [digest([row[:length]]) for row, length in rows]
        line["answered_log_probs"] = digest([texts.log_probs])
        line["sampled"] += int(texts.lengths.sum())
    return line


def recording(keep: Callable[[dict], None]) -> dict[tuple[Any, str], Callable]:
    """What to put in the place of the trainer's functions, by owner and name, so that `keep` gets each step's line."""
    real_step, real_advantages = Trainer.train_step, trainer.advantages_of
    advantages = []

    def advantages_of(*arguments: Any) -> torch.Tensor:
        advantages.append(real_advantages(*arguments))
        return advantages[-1]

    def train_step(self: Trainer, step: int, **options: Any) -> tuple:
        advantages.clear()
        result = real_step(self, step, **options)
        keep(step_line(self.engine, result, advantages[-1]))
        return result

    return {
        (trainer, "advantages_of"): advantages_of,
        (Trainer, "train_step"): train_step,
        (Run, "_report"): lambda _: None,  # half of a small run's time
    }


def die_in(phase: str, stage: str, step: int) -> None:
    """Once training is in this step of the stage, or has just been, the phase's next call is the end."""
    (owner, name), real_step, place = PHASES[phase], Trainer.train_step, None
    real = getattr(owner, name)

    def die(*_: Any) -> None:
        os.killpg(0, signal.SIGKILL)

    def train_step(self: Trainer, number: int, **options: Any) -> tuple:
        nonlocal place
        place = self.name, number
        return real_step(self, number, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if place == (stage, step) and os.environ.get("RANK", "0") == "0":  # others do not wait for its export
            if phase != "save":
                die()
            position, write, *rest = arguments
            arguments = (position, lambda folder: (write(folder), die()), *rest)
        return real(self, *arguments, **options)

    Trainer.train_step = train_step
    setattr(owner, name, call)


def main() -> None:
    path = Path(os.environ["RECORD"]) / f"rank-{os.environ.get('RANK', 0)}.jsonl"

    def keep(line: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for (owner, name), function in recording(keep).items():
        setattr(owner, name, function)
    if os.environ["DEATH"]:
        phase, stage, step = os.environ["DEATH"].split()
        die_in(phase, stage, int(step))
    train.main()


if __name__ == "__main__":
    main()
