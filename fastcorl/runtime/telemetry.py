"""What a run reports while it runs: metrics.jsonl, trackers, and one console line per step.

metrics.jsonl is the record that `truncate_after`, `read_records` and the report rely on; the rest is for watching.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.highlighter import ReprHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastcorl.config import LoggingConfig
from fastcorl.errors import UserError
from fastcorl.records import StepRecord
from fastcorl.runtime.durable import write_text
from fastcorl.runtime.trackers import TrackedRun, Trackers, rate, scalars_of

METRICS_FILE = "metrics.jsonl"
ETA_DECAY = 0.9

# What the console shows of it, where it is known.
HARDWARE = {"mfu": "MFU {:.1%}", "joules_per_image": "{:,.0f} J/img", "power_w": "{:,.0f} W"}


class PhaseTimer:
    """Seconds per named phase. A phase opened inside another is taken out of it, so that the sum is wall-clock time.
    What others do meanwhile is no part of it, and counted apart."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._hidden: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block under `name`."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call, in order of first appearance."""
        self._lap()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def hide(self, name: str, seconds: float) -> None:
        """Work of `name` that a thread did beside the phases."""
        self._hidden[name] = self._hidden.get(name, 0.0) + seconds

    def take_hidden(self) -> dict[str, float]:
        """Hidden seconds since the last call, as figures of a step."""
        hidden, self._hidden = self._hidden, {}
        return {f"{name}_hidden_seconds": seconds for name, seconds in hidden.items()}

    def _lap(self) -> None:
        # Kernels run behind the CPU's back: without this their time would be billed to whichever phase waits for them.
        # Those of other streams run beside the phases and are waited for by whoever needs them.
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


def peak_memory_gib() -> float:
    """Peak GiB: allocated by torch where CUDA is in use, otherwise resident of this process; NaN where unknown."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def read_records(run_dir: str | Path) -> list[StepRecord]:
    """The steps in metrics.jsonl, oldest first; a last line cut short by a kill is left out."""
    path = Path(run_dir) / METRICS_FILE
    return [_from_json(line) for line in _whole_lines(path)] if path.exists() else []


class Telemetry:
    """Writes what a run reports. Only the main rank writes; on any other every method does nothing.

    Trackers are told from `start_trackers` on; one that is not installed is a UserError here, on every rank.

    `total_steps_by_stage` holds the stages in the order they run; the global step counts through them.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config_logging: LoggingConfig,
        total_steps_by_stage: Mapping[str, int],
        is_main: bool,
        console: Console | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self.console = console or Console()
        # Not `console.is_terminal`: FORCE_COLOR makes it true in log files, where a live bar is rubbish.
        self._on_terminal = self.console.file.isatty() and not self.console.is_dumb_terminal
        self._project = config_logging.project
        self._trackers = Trackers(config_logging, self.note)
        self._first_global_step: dict[str, int] = {}
        self._total = 0
        for stage, steps in total_steps_by_stage.items():
            self._first_global_step[stage] = self._total
            self._total += steps
        self._metrics = None
        self._purge_step: int | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._pace: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(failed=kind is not None)

    def global_step(self, stage: str, step: int) -> int:
        """Steps since the start of the run, given the step within `stage`."""
        return self._first_global_step[stage] + step

    def start_trackers(self, settings: Mapping[str, Any]) -> str | None:
        """Start watching, with the resolved configuration to show; returns why it cannot be, if so.

        Call when the run's folder is there and is truncated.
        """
        if not self.is_main:
            return None
        try:
            self._trackers.start(TrackedRun(self.run_dir, self._project, settings, self._purge_step))
        except UserError as error:
            return str(error)
        return None

    def write(self, record: StepRecord) -> None:
        """Report one step everywhere."""
        if not self.is_main:
            return
        if self._metrics is None:
            self._metrics = self._open_metrics()
        with self.unless_full(METRICS_FILE):  # then the next flush writes it
            self._metrics.write(_to_json(record) + "\n")
            self._metrics.flush()
        self._trackers.scalars(scalars_of(record), self.global_step(record.stage, record.step))
        self._show(record)

    def add_scores(self, record: StepRecord) -> None:
        """Add held-out scores to the last record, that of `write` or of a run that is resumed."""
        if not self.is_main:
            return
        path = self.run_dir / METRICS_FILE
        with self.unless_full(METRICS_FILE):
            if self._metrics:
                self._metrics.flush()  # of a full disk's last line; closing would lose it
            self._close_metrics()
            *former, _ = _whole_lines(path)
            _replace(path, [*former, _to_json(record)])
        scores = {name: value for name, value in scalars_of(record).items() if name.startswith("scores/")}
        self._trackers.scalars(scores, self.global_step(record.stage, record.step))

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        """Show an (H, W, 3) uint8 picture in the trackers at a global step."""
        self._trackers.image(tag, array, step)

    def note(self, text: str) -> None:
        """Print a line."""
        if self.is_main:
            self._print(Text(text), text)

    @contextmanager
    def unless_full(self, what: str) -> Iterator[None]:
        """What cannot be written inside the block, as to a full disk, is told in a line and no more."""
        try:
            yield
        except OSError as error:
            self.note(f"{what} could not be written: {error}")

    def truncate_after(self, stage_order: Sequence[str], stage: str, step: int) -> None:
        """Forget everything after `step` of `stage`, where a resumed run goes on. Call before anything is told."""
        if not self.is_main:
            return
        self.close()
        self._purge_step = self.global_step(stage, step) + 1
        path = self.run_dir / METRICS_FILE
        if not path.exists():
            return
        place = {name: index for index, name in enumerate(stage_order)}
        last = (place[stage], step)
        kept = []
        for line in _whole_lines(path):
            record = _from_json(line)
            if record.stage in place and (place[record.stage], record.step) <= last:
                kept.append(line)
        _replace(path, kept)

    def close(self, *, failed: bool = False) -> None:
        """Flush and release everything; trackers learn whether the run `failed`. A later `write` is kept, not shown."""
        if self._progress:
            self._progress.stop()
            self._progress = None
        self._trackers.close(failed=failed)
        self._close_metrics()

    def _close_metrics(self) -> None:
        metrics, self._metrics = self._metrics, None
        if metrics:
            with self.unless_full(METRICS_FILE):
                metrics.close()

    def _open_metrics(self):
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / METRICS_FILE
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        return path.open("a", encoding="utf-8", newline="\n")

    def _show(self, record: StepRecord) -> None:
        done = self.global_step(record.stage, record.step)
        eta = self._eta(record, done)
        line = step_line(record, eta)
        styled = ReprHighlighter()(Text(line))
        styled.stylize("bold", 0, line.index(" | "))
        self._print(styled, line)
        if self._on_terminal:
            if self._progress is None:
                self._progress = _progress_bar(self.console)
                self._task = self._progress.add_task(record.stage, total=self._total, eta="")
            self._progress.update(self._task, description=record.stage, completed=done, eta=duration(eta))
            self._progress.start()

    def _eta(self, record: StepRecord, done: int) -> float:
        """Seconds left in the run, from the recent pace of this stage."""
        pace = record.step_seconds
        if self._pace and self._pace[0] == record.stage:
            pace = ETA_DECAY * self._pace[1] + (1 - ETA_DECAY) * pace
        self._pace = (record.stage, pace)
        return pace * max(self._total - done, 0)

    def _print(self, styled: Text, plain: str) -> None:
        if self._on_terminal:
            self.console.print(styled)
        else:
            # rich would fold the line at 80 columns, and colour it under FORCE_COLOR.
            print(plain, file=self.console.file, flush=True)


def step_line(record: StepRecord, eta_seconds: float) -> str:
    """One step in one line; rates are over the step's own seconds, `eta_seconds` is for the whole run."""
    seconds = record.step_seconds
    rewards = " ".join(f"{name} {value:.3f}" for name, value in record.rewards.items())
    metrics = " ".join(f"{name} {value:.3g}" for name, value in record.metrics.items() if _is_headline(name))
    rates = f"{rate(record.tokens, seconds):,.0f} tok/s {rate(record.images, seconds):,.1f} img/s"
    hardware = [text.format(record.metrics[name]) for name, text in HARDWARE.items() if name in record.metrics]
    phases = " ".join(f"{name} {value:.2f}" for name, value in record.seconds.items())
    parts = [
        f"{record.stage} {record.step}/{record.total_steps}",
        rewards and f"reward {rewards}",
        metrics,
        " ".join([rates, *hardware]),
        f"{seconds:.2f} s" + (f" ({phases})" if phases else ""),
        f"{record.memory_gib:.2f} GiB",
        f"ETA {duration(eta_seconds)}",
    ]
    return " | ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Seconds as "42s", "3m20s", "1h05m" or "2d03h"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
        console=console,
        refresh_per_second=2,
        transient=True,
    )


def _is_headline(name: str) -> bool:
    return name == "grad_norm" or not {"loss", "kl"}.isdisjoint(re.split(r"[/_]", name))


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline; a kill can leave a last one that does not."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _replace(path: Path, lines: list[str]) -> None:
    """A kill in the middle of an in-place rewrite would lose the whole history."""
    write_text(path, "".join(line + "\n" for line in lines))


def _to_json(record: StepRecord) -> str:
    return json.dumps(_plain(asdict(record)), allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str | int):
        return value
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")


def _from_json(line: str) -> StepRecord:
    fields = json.loads(line)
    for group in ("rewards", "metrics", "seconds", "scores"):
        fields[group] = {name: float(value) for name, value in fields[group].items()}
    return StepRecord(**fields | {"memory_gib": float(fields["memory_gib"])})
