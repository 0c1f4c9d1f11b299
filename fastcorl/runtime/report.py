"""What runs achieved: report.png from metrics and held-out scores, of one run or several, and the scores as tables."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from fastcorl.errors import UserError
from fastcorl.records import StepRecord
from fastcorl.runtime.curves import (
    INK,
    MUTED,
    STYLE,
    RunCurves,
    curves_of,
    draw_curve,
    mark_stages,
    names_in,
    palette,
    plot,
    run_colours,
)
from fastcorl.runtime.telemetry import METRICS_FILE, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SCORES_FILE = "scores.json"
ANSWER_SCORES = ("accuracy", "mc", "oe", "format")
ANSWER_REWARDS = ("acc", "accuracy", "format")
DRAWING_SCORES = ("overall", "digit", "colour", "position", "count")
NONE = "–"
COLUMNS = 3  # of curves, where runs are compared


@dataclass(frozen=True)
class RunResults:
    """What a run's folder tells of it; `settings` has the resolved configuration as text by dotted key."""

    label: str
    folder: Path
    records: list[StepRecord]
    scores: list[dict[str, Any]]
    settings: dict[str, str]


def read_run(folder: str | Path, label: str | None = None) -> RunResults:
    """Raises UserError where there is no run, or what it wrote cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run (a run is the folder that training wrote, such as runs/quickstart)")
    try:
        what = METRICS_FILE
        records = read_records(folder)
        what = SCORES_FILE
        scores = [{"stage": str(entry["stage"]), "scores": dict(entry["scores"])} for entry in read_scores(folder)]
        what = "config.yaml"
        config = folder / what
        settings = _flat(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.exists() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / what}: cannot be read as a run's: {error!r}") from error
    if not records and not scores:
        raise UserError(f"{folder}: nothing to report, no step in {METRICS_FILE} and no {SCORES_FILE}")
    return RunResults(label or folder.resolve().name, folder, records, scores, settings)


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested mappings as one, of dotted names and text."""
    if isinstance(value, dict) and value:
        prefix = f"{name}." if name else ""
        return {key: text for part, inner in value.items() for key, text in _flat(inner, f"{prefix}{part}").items()}
    return {name: value if isinstance(value, str) else json.dumps(value, default=str)} if name else {}


def draw_report(run_dir: str | Path, path: Path | None = None) -> Path:
    """Draw a run's metrics.jsonl and, where it exists, scores.json, to `<run_dir>/report.png` unless `path` is given;
    returns the path."""
    run_dir = Path(run_dir)
    path = path or run_dir / "report.png"
    records, scores = read_records(run_dir), read_scores(run_dir)
    title = f"{run_dir.resolve().name}: {summary(records)}"

    def draw(figure: "Figure") -> None:
        run = RunCurves(records)
        panels = figure.subfigures(3, 2)
        _draw_rewards(panels[0, 0], run)
        _draw_answers(panels[0, 1], run)
        _draw_scores(panels[1, 0], scores, "Drawings, held out", _score_names(scores, False))
        _draw_scores(panels[1, 1], scores, "Answers, held out", _score_names(scores, True))
        _draw_health(panels[2, 0], run)
        _draw_seconds(panels[2, 1], run)

    save_figure(path, (15, 14), draw, title=title)
    return path


def draw_comparison(runs: Sequence[RunResults], path: Path) -> Path:
    """Draw several runs over one another, a curve per panel, and their last held-out scores; returns `path`."""
    from matplotlib.lines import Line2D

    curves = curves_of([record for run in runs for record in run.records])
    rows = -(-len(curves) // COLUMNS)

    def draw(figure: "Figure") -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=[2.6 * rows, 4])
        cells = list(upper.subplots(rows, COLUMNS, squeeze=False).flat)
        lines = [RunCurves(run.records) for run in runs]
        for axes in cells:
            axes.set_axis_off()
        for axes, curve in zip(cells, curves, strict=False):
            axes.set_axis_on()
            draw_curve(axes, curve, lines)
        scores, colours = last_scores(runs), run_colours(len(runs))
        handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
        upper.legend(handles, [run.label for run in runs], loc="outside upper left", ncols=5)
        panels = lower.subfigures(1, 2)
        for panel, title, answers in ((panels[0], "Drawings", False), (panels[1], "Answers", True)):
            _draw_scores(panel, scores, f"{title}, held out, at the end", _score_names(scores, answers), colours)

    save_figure(path, (15, 2.6 * rows + 4.5), draw, title=f"{len(runs)} runs")
    return path


def save_figure(
    target: Path | BinaryIO,
    size: tuple[float, float],
    draw: Callable[["Figure"], None],
    *,
    title: str = "",
    dpi: int = 110,
) -> None:
    """Have `draw` fill a figure of `size` inches in the house style, and save it as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        if title:
            figure.get_layout_engine().set(w_pad=0.1, h_pad=0.09, wspace=0.02, hspace=0.02)
            figure.suptitle(title, fontsize=13, x=0.01, ha="left", color=INK)
        draw(figure)
        figure.savefig(target, format="png")


def last_scores(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    """The last held-out scores of each run, none if it has none, as entries under the runs' labels."""
    return [{"stage": run.label, "scores": run.scores[-1]["scores"] if run.scores else {}} for run in runs]


def read_scores(run_dir: str | Path) -> list[dict[str, Any]]:
    """Held-out scores in the order of evaluation: {"stage": name, "scores": {name: fraction}}."""
    path = Path(run_dir) / SCORES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def score_table(scores: Sequence[dict[str, Any]]) -> str:
    """Held-out scores as a Markdown table, in %, with the change from first to last in percentage points."""
    header, rows = score_rows(scores)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def print_scores(scores: Sequence[dict[str, Any]], console: Console) -> None:
    """Print held-out scores in %, a column per evaluation, and the change from first to last in percentage points."""
    header, rows = score_rows(scores)
    table = Table(title="Held-out scores, %", title_justify="left", title_style="bold")
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for *cells, last in rows:
        colour = {"+": "green", "-": "red"}.get(last[0]) if len(scores) > 1 else None
        table.add_row(*cells, f"[{colour}]{last}[/]" if colour else last)
    console.print(table)


def score_rows(scores: Sequence[dict[str, Any]], *, change: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows of held-out scores in %; with `change`, that from first to last if there are two."""
    names = [*_score_names(scores, False), *_score_names(scores, True)]
    header = ["score", *(entry["stage"] for entry in scores)]
    rows = [[name, *(_percent(entry["scores"].get(name)) for entry in scores)] for name in names]
    if len(scores) > 1 and change:
        header.append("change")
        for name, row in zip(names, rows, strict=True):
            first, last = (scores[end]["scores"].get(name, math.nan) for end in (0, -1))
            points = 100 * (last - first)
            row.append(NONE if math.isnan(points) else f"{points:+.1f}")
    return header, rows


def _percent(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _score_names(scores: Sequence[dict[str, Any]], answers: bool) -> list[str]:
    """Names that occur, the known ones first; whatever is not a score of answers is taken for one of drawings."""
    found = names_in(entry["scores"] for entry in scores)
    known = ANSWER_SCORES if answers else DRAWING_SCORES
    rest = [] if answers else [name for name in found if name not in (*DRAWING_SCORES, *ANSWER_SCORES)]
    return [name for name in known if name in found] + rest


def summary(records: Sequence[StepRecord]) -> str:
    """Steps, time, drawings and tokens in words."""
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


def _draw_scores(
    panel: "SubFigure",
    scores: Sequence[dict[str, Any]],
    title: str,
    names: Sequence[str],
    colours: Sequence[Any] | None = None,
) -> None:
    if not names:
        _empty(panel, title)
        return
    axes = panel.subplots()
    axes.set_title(title, color=INK, pad=20)
    width = 0.8 / len(scores)
    for number, (entry, colour) in enumerate(zip(scores, colours or _ramp(len(scores)), strict=True)):
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


def _draw_rewards(panel: "SubFigure", run: RunCurves) -> None:
    names = names_in(record.rewards for record in run.records)
    parts = [name for name in names if name != "total" and name not in ANSWER_REWARDS]
    strips = [("mean total", ["total"] if "total" in names else []), ("mean of part", parts)]
    _draw_strips(panel, run, "Rewards in training", strips, lambda record: record.rewards)


def _draw_answers(panel: "SubFigure", run: RunCurves) -> None:
    names = [name for name in names_in(record.rewards for record in run.records) if name in ANSWER_REWARDS]
    _draw_strips(panel, run, "Answers in training", [("mean reward", names)], lambda record: record.rewards)


def _draw_health(panel: "SubFigure", run: RunCurves) -> None:
    names = names_in(record.metrics for record in run.records)
    strips = [
        ("KL, nats", [name for name in names if "kl" in re.split(r"[/_]", name)]),
        ("entropy, nats", [name for name in names if "entropy" in re.split(r"[/_]", name)]),
        ("gradient norm", [name for name in names if name == "grad_norm"]),
    ]
    _draw_strips(panel, run, "KL, entropy, gradient norm", strips, lambda record: record.metrics)


def _draw_strips(
    panel: "SubFigure",
    run: RunCurves,
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
        for name, colour in zip(names, palette(len(names)), strict=True):
            plot(axes, run, run.series(lambda record, name=name: values(record).get(name)), colour, name)
        mark_stages(axes, run, labels=axes is all_axes[0])
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        if len(names) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    all_axes[0].set_title(title, color=INK, pad=20)
    all_axes[-1].set_xlabel("step")
    panel.align_ylabels()


def _draw_seconds(panel: "SubFigure", run: RunCurves) -> None:
    names, title = names_in(record.seconds for record in run.records), "Time per step"
    if not names:
        _empty(panel, title)
        return
    axes = panel.subplots()
    axes.set_title(title, color=INK, pad=20)
    layers = [
        run.smooth(np.nan_to_num(run.series(lambda record, name=name: record.seconds.get(name)))) for name in names
    ]
    colours = palette(len(names))
    for number, (_, first, last) in enumerate(run.stages):
        inside = (run.steps >= first) & (run.steps <= last)
        # Half a step to either side: stages meet, and a stage of one step still has an area.
        x = np.concatenate([[first - 0.5], run.steps[inside], [last + 0.5]])
        heights = [np.pad(layer[inside], 1, mode="edge") for layer in layers]
        axes.stackplot(x, heights, colors=colours, labels=[] if number else names, alpha=0.85, linewidth=0)
    mark_stages(axes, run)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    _legend(axes)


def _ramp(count: int) -> list[Any]:
    """Grey for the start, then from light to dark: the later, the stronger."""
    from matplotlib import colormaps

    later = [colormaps["YlGnBu"](place) for place in np.linspace(0.4, 0.9, max(count - 1, 1))]
    return ["#c4c4c4", *later][:count]
