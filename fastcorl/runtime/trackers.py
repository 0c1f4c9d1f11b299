"""Where a run is watched: TensorBoard, W&B and trackio, all told the same numbers and pictures.

A tracker that cannot start is the user's to know before the run; one that fails later is left out, and the run goes on.
metrics.jsonl (telemetry.py) depends on none of them.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastcorl.config import LoggingConfig
from fastcorl.errors import UserError
from fastcorl.plugins import check_package
from fastcorl.records import StepRecord
from fastcorl.runtime.durable import write_text

ID_FILE = "tracker_id"
STEP = "global_step"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts; steps from `purge_step` on, if any, will be told again."""

    folder: Path
    project: str
    settings: Mapping[str, Any]
    purge_step: int | None = None

    def tracker_id(self) -> str:
        """Made once per run folder, so that a resumed run goes on where it was watched before."""
        path = self.folder / ID_FILE
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:8])
        return path.read_text().strip()


class Tracker(Protocol):
    """Built from a TrackedRun; any exception means that it cannot start."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers at a global step."""

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show an (H, W, 3) uint8 picture at a global step."""

    def close(self, *, failed: bool) -> None:
        """Flush; `failed` when the run ended in an error."""


class TensorBoard:
    """Events under `<run>/tensorboard`."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.purge_step, flush_secs=30)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; login, entity and mode are taken from its own environment variables."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=run.project,
            name=run.folder.name,
            id=run.tracker_id(),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            allow_val_change=True,
        )
        # W&B's own step only grows, and would drop the steps that a resumed run does again.
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._run.log({tag: self._image(picture), STEP: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, on this machine unless its environment variables name a Space or a server."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._image = trackio.Image
        self._run = trackio.init(
            project=run.project,
            name=f"{run.folder.name}-{run.tracker_id()}",
            resume="allow",
            config=dict(run.settings),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._run.log({tag: self._image(picture)}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


# By their keys in the section `logging`, which are the packages' names too.
TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


class Trackers:
    """The trackers that a configuration asks for. Raises UserError where one is not installed.

    `warn` prints a line.
    """

    def __init__(self, config: LoggingConfig, warn: Callable[[str], None]) -> None:
        self._wanted = [name for name in TRACKERS if getattr(config, name)]
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in self._wanted:
            check_package(name, f"logging.{name}", _otherwise(name))

    def start(self, run: TrackedRun) -> None:
        """Start them all; raises UserError where one cannot."""
        for name in self._wanted:
            try:
                self._open[name] = TRACKERS[name](run)
            except Exception as error:  # whatever it is, of a package that is not ours
                raise UserError(f"logging.{name}: {name} cannot start: {_line(error)}; {_otherwise(name)}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers at a global step."""
        self._tell(lambda tracker: tracker.scalars(values, step))

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show an (H, W, 3) uint8 picture at a global step."""
        self._tell(lambda tracker: tracker.image(tag, picture, step))

    def close(self, *, failed: bool) -> None:
        """Flush and end them all."""
        self._tell(lambda tracker: tracker.close(failed=failed))
        self._open = {}

    def _tell(self, message: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                message(tracker)
            except Exception as error:
                del self._open[name]
                self._warn(f"{name} failed and is left out from here on: {_line(error)}")


def scalars_of(record: StepRecord) -> dict[str, float]:
    """All numbers of a step by the names under which trackers show them."""
    values = {
        f"{group}/{name}": float(value)
        for group in ("rewards", "metrics", "seconds", "scores")
        for name, value in getattr(record, group).items()
    }
    values["throughput/tokens_per_second"] = rate(record.tokens, record.step_seconds)
    values["throughput/images_per_second"] = rate(record.images, record.step_seconds)
    values["memory/gib"] = float(record.memory_gib)
    return values


def rate(amount: float, seconds: float) -> float:
    """Per second; 0 for a step without time."""
    return amount / seconds if seconds > 0 else 0.0


def _otherwise(name: str) -> str:
    return f"--logging.{name} false does without"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
