"""Curves of runs over their steps: one chart per figure, with a line per run."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcorl.records import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5B5B5B")
INK, MUTED, LONE, SHADE = "#222222", "#6b6b6b", "#444444", "#f3f4f6"

# Words of the metrics that say whether training is healthy, and metrics of the hardware.
HEALTH = ("loss", "kl", "entropy", "mismatch")
HARDWARE = {"mfu": "MFU", "power_w": "power, W", "joules_per_image": "joules per drawing"}

STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # names of rewards and runs are the user's
    "axes.edgecolor": "#b0b0b0",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class RunCurves:
    """Records laid end to end: `steps` is the x axis, `stages` holds (name, first, last) on it."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self.records = records
        self.stages: list[tuple[str, int, int]] = []
        steps, offset = [], 0
        for record in records:
            if not self.stages or self.stages[-1][0] != record.stage:
                offset = steps[-1] if steps else 0
                self.stages.append((record.stage, offset + record.step, offset + record.step))
            steps.append(offset + record.step)
            self.stages[-1] = (*self.stages[-1][:2], steps[-1])
        self.steps = np.array(steps, dtype=float)

    def series(self, value: Callable[[StepRecord], float | None]) -> np.ndarray:
        """(records,) float64, NaN where a record has no finite value."""
        values = (value(record) for record in self.records)
        series = np.array([math.nan if one is None else one for one in values], dtype=float)
        return np.where(np.isfinite(series), series, np.nan)

    def smooth(self, series: np.ndarray) -> np.ndarray:
        """Centred moving average inside each stage, over a tenth of it."""
        result = np.full_like(series, np.nan)
        for _, first, last in self.stages:
            inside = (self.steps >= first) & (self.steps <= last)
            values = series[inside]
            present = np.isfinite(values)
            kernel = np.ones(2 * (len(values) // 20) + 1)
            counts = np.convolve(present, kernel)
            sums = np.convolve(np.where(present, values, 0.0), kernel)
            half = len(kernel) // 2
            counts, sums = counts[half : half + len(values)], sums[half : half + len(values)]
            # A curve must not run on through steps that never reported the value.
            result[inside] = np.where(present, sums / np.maximum(counts, 1), np.nan)
        return result


def names_in(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names in order of first appearance."""
    return list(dict.fromkeys(name for group in groups for name in group))


@dataclass(frozen=True)
class Curve:
    """One figure of a step; None where a step does not have it."""

    title: str
    value: Callable[[StepRecord], float | None]


def curves_of(records: Sequence[StepRecord]) -> list[Curve]:
    """The curves that tell how training went: rewards, loss, KL, entropy, mismatch, gradient norm, time, hardware."""
    rewards = names_in(record.rewards for record in records)
    metrics = names_in(record.metrics for record in records)
    health = [name for word in HEALTH for name in metrics if word in re.split(r"[/_]", name)]
    curves = [_reward_curve(name) for name in sorted(rewards, key=lambda name: name != "total")]
    curves += [_metric_curve(name, re.sub(r"\bkl\b", "KL", name.replace("_", " "))) for name in health]
    curves += [_metric_curve("grad_norm", "gradient norm")] if "grad_norm" in metrics else []
    curves += [Curve("seconds per step", lambda record: record.step_seconds)]
    return curves + [_metric_curve(name, title) for name, title in HARDWARE.items() if name in metrics]


def _reward_curve(name: str) -> Curve:
    return Curve(f"reward: {name}", lambda record: record.rewards.get(name))


def _metric_curve(name: str, title: str) -> Curve:
    return Curve(title, lambda record: record.metrics.get(name))


def draw_curve(axes: "Axes", curve: Curve, runs: Sequence[RunCurves]) -> None:
    """A line per run that has steps, in the order and colours of `run_colours`."""
    axes.set_title(curve.title, color=INK, pad=18)
    for run, colour in zip(runs, run_colours(len(runs)), strict=True):
        if run.stages:
            plot(axes, run, run.series(curve.value), colour)
    longest = max(runs, key=lambda run: len(run.steps))
    if all(_same_beginning(run, longest) for run in runs):
        mark_stages(axes, longest)
    axes.margins(y=0.12)
    axes.set_xlabel("step")


def _same_beginning(run: RunCurves, longest: RunCurves) -> bool:
    """Whether the stages of `run`, the last perhaps cut short, are those that `longest` begins with."""
    theirs = longest.stages[: len(run.stages)]
    same_starts = [stage[:2] for stage in run.stages] == [stage[:2] for stage in theirs]
    return same_starts and run.stages[:-1] == theirs[:-1]


def mark_stages(axes: "Axes", run: RunCurves, labels: bool = True) -> None:
    """Shade every other stage, and name them above the axes."""
    if not run.stages:
        return
    start = run.steps[0] - 0.5
    for number, (name, _, last) in enumerate(run.stages):
        if number % 2 == 0:
            axes.axvspan(start, last + 0.5, color=SHADE, zorder=0, linewidth=0)
        if labels:
            middle = (start + last + 0.5) / 2
            axes.annotate(
                name,
                (middle, 1),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=MUTED,
            )
        start = last + 0.5
    axes.set_xlim(run.steps[0] - 0.5, run.steps[-1] + 0.5)


def plot(axes: "Axes", run: RunCurves, series: np.ndarray, colour: str, label: str | None = None) -> None:
    """A faint line of the values and a strong one of their moving average."""
    axes.plot(run.steps, series, color=colour, alpha=0.22, linewidth=0.9)
    smooth = run.smooth(series)
    for number, (_, first, last) in enumerate(run.stages):
        inside = (run.steps >= first) & (run.steps <= last)
        lone = "o" if inside.sum() == 1 else None
        axes.plot(
            run.steps[inside], smooth[inside], color=colour, linewidth=1.9, marker=lone, label=None if number else label
        )


def palette(count: int) -> list[str]:
    """A colour per name; a curve on its own is neutral, lest it seem to be the first of another panel."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)] if count > 1 else [LONE]


def run_colours(count: int) -> list[str]:
    """A colour per run."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
