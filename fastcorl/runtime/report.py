"""What a run achieved: report.png from its metrics and held-out scores, and the same scores as tables."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastcorl.records import StepRecord
from fastcorl.runtime.telemetry import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SCORES_FILE = "scores.json"
ANSWER_SCORES = ("accuracy", "mc", "oe", "format")
ANSWER_REWARDS = ("acc", "accuracy", "format")
DRAWING_SCORES = ("overall", "digit", "colour", "position", "count")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5B5B5B")
INK, MUTED, LONE, SHADE = "#222222", "#6b6b6b", "#444444", "#f3f4f6"
NONE = "–"


def draw_report(run_dir: str | Path) -> Path:
    """Draw `<run_dir>/report.png` from metrics.jsonl and, where it exists, scores.json; returns its path."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    records, scores = read_records(run_dir), read_scores(run_dir)
    with rc_context(_STYLE):
        figure = Figure(figsize=(15, 14), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.09, wspace=0.02, hspace=0.02)
        figure.suptitle(f"{run_dir.resolve().name}: {_summary(records)}", fontsize=13, x=0.01, ha="left", color=INK)
        run = _Run(records)
        panels = figure.subfigures(3, 2)
        _draw_rewards(panels[0, 0], run)
        _draw_answers(panels[0, 1], run)
        _draw_scores(panels[1, 0], scores, "Drawings, held out", _score_names(scores, False))
        _draw_scores(panels[1, 1], scores, "Answers, held out", _score_names(scores, True))
        _draw_health(panels[2, 0], run)
        _draw_seconds(panels[2, 1], run)
        path = run_dir / "report.png"
        figure.savefig(path)
    return path


def read_scores(run_dir: str | Path) -> list[dict[str, Any]]:
    """Held-out scores in the order of evaluation: {"stage": name, "scores": {name: fraction}}."""
    path = Path(run_dir) / SCORES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def score_table(scores: Sequence[dict[str, Any]]) -> str:
    """Held-out scores as a Markdown table, in %, with the change from first to last in percentage points."""
    header, rows = _table(scores)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def print_scores(scores: Sequence[dict[str, Any]], console: Console) -> None:
    """Print held-out scores in %, a column per evaluation, and the change from first to last in percentage points."""
    header, rows = _table(scores)
    table = Table(title="Held-out scores, %", title_justify="left", title_style="bold")
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for *cells, last in rows:
        colour = {"+": "green", "-": "red"}.get(last[0]) if len(scores) > 1 else None
        table.add_row(*cells, f"[{colour}]{last}[/]" if colour else last)
    console.print(table)


def _table(scores: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = [*_score_names(scores, False), *_score_names(scores, True)]
    header = ["score", *(entry["stage"] for entry in scores)]
    rows = [[name, *(_percent(entry["scores"].get(name)) for entry in scores)] for name in names]
    if len(scores) > 1:
        header.append("change")
        for name, row in zip(names, rows, strict=True):
            first, last = (scores[end]["scores"].get(name, math.nan) for end in (0, -1))
            change = 100 * (last - first)
            row.append(NONE if math.isnan(change) else f"{change:+.1f}")
    return header, rows


def _percent(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _score_names(scores: Sequence[dict[str, Any]], answers: bool) -> list[str]:
    """Names that occur, the known ones first; whatever is not a score of answers is taken for one of drawings."""
    found = _names(entry["scores"] for entry in scores)
    known = ANSWER_SCORES if answers else DRAWING_SCORES
    rest = [] if answers else [name for name in found if name not in (*DRAWING_SCORES, *ANSWER_SCORES)]
    return [name for name in known if name in found] + rest


_STYLE = {
    "font.size": 10,
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


class _Run:
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


def _names(groups: Iterable[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _summary(records: Sequence[StepRecord]) -> str:
    if not records:
        return "no steps recorded"
    hours = sum(record.step_seconds for record in records) / 3600
    time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    images, tokens = sum(record.images for record in records), sum(record.tokens for record in records)
    return f"{len(records):,} steps in {time}, {images:,} drawings, {tokens:,} tokens"


def _empty(panel: "SubFigure", title: str) -> None:
    axes = panel.subplots()
    axes.set_title(title, color=INK, pad=20)
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=MUTED)


def _legend(axes: "Axes", **options: Any) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.055), ncols=6, borderaxespad=0, columnspacing=1.2, **options)


def _mark_stages(axes: "Axes", run: _Run, labels: bool = True) -> None:
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


def _plot(axes: "Axes", run: _Run, series: np.ndarray, colour: str, label: str | None = None) -> None:
    axes.plot(run.steps, series, color=colour, alpha=0.22, linewidth=0.9)
    smooth = run.smooth(series)
    for number, (_, first, last) in enumerate(run.stages):
        inside = (run.steps >= first) & (run.steps <= last)
        lone = "o" if inside.sum() == 1 else None
        axes.plot(
            run.steps[inside], smooth[inside], color=colour, linewidth=1.9, marker=lone, label=None if number else label
        )


def _draw_scores(panel: "SubFigure", scores: Sequence[dict[str, Any]], title: str, names: Sequence[str]) -> None:
    if not names:
        _empty(panel, title)
        return
    axes = panel.subplots()
    axes.set_title(title, color=INK, pad=20)
    width = 0.8 / len(scores)
    for number, (entry, colour) in enumerate(zip(scores, _ramp(len(scores)), strict=True)):
        places = np.arange(len(names)) + (number - (len(scores) - 1) / 2) * width
        heights = [100 * entry["scores"].get(name, math.nan) for name in names]
        bars = axes.bar(places, heights, width * 0.92, color=colour, label=entry["stage"])
        if len(scores) * len(names) <= 32:
            labels = ["" if math.isnan(height) else f"{height:.0f}" for height in heights]
            axes.bar_label(bars, labels, padding=2, fontsize=8, color=MUTED)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 106)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("score, %")
    _legend(axes)


def _draw_rewards(panel: "SubFigure", run: _Run) -> None:
    names = _names(record.rewards for record in run.records)
    parts = [name for name in names if name != "total" and name not in ANSWER_REWARDS]
    strips = [("mean total", ["total"] if "total" in names else []), ("mean of part", parts)]
    _draw_strips(panel, run, "Rewards in training", strips, lambda record: record.rewards)


def _draw_answers(panel: "SubFigure", run: _Run) -> None:
    names = [name for name in _names(record.rewards for record in run.records) if name in ANSWER_REWARDS]
    _draw_strips(panel, run, "Answers in training", [("mean reward", names)], lambda record: record.rewards)


def _draw_health(panel: "SubFigure", run: _Run) -> None:
    names = _names(record.metrics for record in run.records)
    strips = [
        ("KL, nats", [name for name in names if "kl" in re.split(r"[/_]", name)]),
        ("entropy, nats", [name for name in names if "entropy" in re.split(r"[/_]", name)]),
        ("gradient norm", [name for name in names if name == "grad_norm"]),
    ]
    _draw_strips(panel, run, "KL, entropy, gradient norm", strips, lambda record: record.metrics)


def _draw_strips(
    panel: "SubFigure",
    run: _Run,
    title: str,
    strips: Sequence[tuple[str, Sequence[str]]],
    values: Callable[[StepRecord], dict[str, float]],
) -> None:
    """Curves whose scales differ, in strips (label of y, names of curves) over one x axis."""
    strips = [(label, names) for label, names in strips if names]
    if not strips:
        _empty(panel, title)
        return
    all_axes = panel.subplots(len(strips), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(all_axes, strips, strict=True):
        for name, colour in zip(names, _palette(len(names)), strict=True):
            _plot(axes, run, run.series(lambda record, name=name: values(record).get(name)), colour, name)
        _mark_stages(axes, run, labels=axes is all_axes[0])
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        if len(names) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    all_axes[0].set_title(title, color=INK, pad=20)
    all_axes[-1].set_xlabel("step")
    panel.align_ylabels()


def _draw_seconds(panel: "SubFigure", run: _Run) -> None:
    names, title = _names(record.seconds for record in run.records), "Time per step"
    if not names:
        _empty(panel, title)
        return
    axes = panel.subplots()
    axes.set_title(title, color=INK, pad=20)
    layers = [
        run.smooth(np.nan_to_num(run.series(lambda record, name=name: record.seconds.get(name)))) for name in names
    ]
    colours = _palette(len(names))
    for number, (_, first, last) in enumerate(run.stages):
        inside = (run.steps >= first) & (run.steps <= last)
        # Half a step to either side: stages meet, and a stage of one step still has an area.
        x = np.concatenate([[first - 0.5], run.steps[inside], [last + 0.5]])
        heights = [np.pad(layer[inside], 1, mode="edge") for layer in layers]
        axes.stackplot(x, heights, colors=colours, labels=[] if number else names, alpha=0.85, linewidth=0)
    _mark_stages(axes, run)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    _legend(axes)


def _palette(count: int) -> list[str]:
    """A colour per name; a curve on its own is neutral, lest it seem to be the first of another panel."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)] if count > 1 else [LONE]


def _ramp(count: int) -> list[Any]:
    """Grey for the start, then from light to dark: the later, the stronger."""
    from matplotlib import colormaps

    later = [colormaps["YlGnBu"](place) for place in np.linspace(0.4, 0.9, max(count - 1, 1))]
    return ["#c4c4c4", *later][:count]
