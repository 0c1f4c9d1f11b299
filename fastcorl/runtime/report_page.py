"""What runs achieved as one HTML page that needs no other file: pictures are in it, and there is no script."""

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from fastcorl.records import StepRecord
from fastcorl.runtime.curves import Curve, RunCurves, curves_of, draw_curve, names_in, run_colours
from fastcorl.runtime.durable import write_text
from fastcorl.runtime.report import NONE, RunResults, last_scores, save_figure, score_rows, summary
from fastcorl.runtime.samples import SampleFile, read_answers, sample_files

MAX_PICTURE_BYTES = 1_000_000  # larger ones are compressed, which a grid of photographs can bear
SHOWN_PROMPTS, SHOWN_ANSWERS = 4, 3

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1240px; margin: 2em auto;
  padding: 0 1.2em }
h1 { font-size: 1.6em; margin: 0 0 .4em }
h2 { font-size: 1.2em; margin: 2em 0 .6em; border-bottom: 1px solid #ddd; padding-bottom: .2em }
h3 { font-size: 1em; margin: 1.2em 0 .4em }
nav { display: flex; flex-wrap: wrap; gap: 0 1.2em }
nav a { color: #0060a0; text-decoration: none; white-space: nowrap }
p.note { color: #6b6b6b; margin: .3em 0 .8em }
table { border-collapse: collapse; font-size: .92em; margin: .3em 0 1em }
section { overflow-x: auto }
th, td { padding: .25em .8em; border-bottom: 1px solid #e5e5e5; text-align: left; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere }
th { font-weight: 600; color: #555; overflow-wrap: normal }
table.settings td:first-child, table.numbers td, table.numbers th { white-space: nowrap }
table.numbers td + td, table.numbers th + th { text-align: right; font-variant-numeric: tabular-nums }
tr.group td { background: #f3f4f6; font-weight: 600 }
tr.differs td { background: #fff3d6 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(370px, 100%), 1fr)); gap: .8em }
.charts img, .grids img { width: 100%; height: auto }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1.2em;
  align-items: start }
figure { margin: 0 }
figcaption { color: #6b6b6b; margin-bottom: .3em }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em }
.legend span { margin-right: 1.4em }
summary { cursor: pointer; color: #0060a0 }
"""


def write_page(runs: Sequence[RunResults], path: Path) -> Path:
    """Write the page of one run, or of several compared, to `path`; returns it."""
    title = ", ".join(run.label for run in runs)
    sections = [
        ("curves", "Curves", _curves(runs)),
        ("scores", "Held-out scores", _scores(runs)),
        ("drawings", "Drawings", _drawings(runs)),
        ("answers", "Answers", _answers(runs)),
        ("time", "Time", _phases(runs)),
        ("hardware", "Hardware", _hardware(runs)),
        ("configuration", "Configuration", _settings(runs)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "\n".join(f'<section id="{name}"><h2>{heading}</h2>\n{inner}</section>' for name, heading, inner in sections)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{_escaped(title)}</h1>\n{_summaries(runs)}\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )
    # An answer may have half a surrogate pair, which UTF-8 cannot write.
    write_text(path, page.encode("utf-8", "xmlcharrefreplace").decode("utf-8"))
    return path


def _summaries(runs: Sequence[RunResults]) -> str:
    rows = []
    for run in runs:
        stages = " → ".join(dict.fromkeys(record.stage for record in run.records))
        rows.append([run.label, summary(run.records), stages or NONE])
    return _table(["run", "what", "stages"], rows)


def _curves(runs: Sequence[RunResults]) -> str:
    trained = [run for run in runs if run.records]
    if not trained:
        return ""
    lines = [RunCurves(run.records) for run in trained]
    curves = curves_of([record for run in trained for record in run.records])
    charts = "\n".join(_chart(curve, lines) for curve in curves)
    note = "Faint: each step. Strong: moving average over a tenth of a stage."
    legend = "".join(
        f'<span><i class="dot" style="background:{colour}"></i>{_escaped(run.label)}</span>'
        for run, colour in zip(trained, run_colours(len(trained)), strict=True)
    )
    legend = f'<p class="legend">{legend}</p>' if len(trained) > 1 else ""
    return f'<p class="note">{note}</p>{legend}<div class="charts">\n{charts}\n</div>'


def _chart(curve: Curve, lines: Sequence[RunCurves]) -> str:
    file = io.BytesIO()
    save_figure(file, (5.2, 2.8), lambda figure: draw_curve(figure.subplots(), curve, lines), dpi=140)
    return _image(file.getvalue(), "png", curve.title)


def _scores(runs: Sequence[RunResults]) -> str:
    parts = []
    if len(runs) > 1 and any(run.scores for run in runs):
        header, rows = score_rows(last_scores(runs), change=False)
        parts.append("<h3>At the end of each run</h3>" + _table(header, rows, "numbers"))
    for run in runs:
        if run.scores:
            parts.append(_heading(run, runs) + _table(*score_rows(run.scores), "numbers"))
    return '<p class="note">In %; the change is in percentage points.</p>' + "\n".join(parts) if parts else ""


def _drawings(runs: Sequence[RunResults]) -> str:
    parts = []
    for run in runs:
        drew = {record.stage for record in run.records if record.images}
        files = [file for file in sample_files(run.folder / "samples") if file.stage in drew]
        figures = "".join(
            f"<figure><figcaption>{when}: {_place(file)}</figcaption>{_grid(file)}</figure>"
            for when, file in _ends(files)
        )
        if figures:
            parts.append(f'{_heading(run, runs)}<div class="grids">{figures}</div>')
    return "\n".join(parts)


def _grid(file: SampleFile) -> str:
    data, kind = file.picture.read_bytes(), "png"
    if len(data) > MAX_PICTURE_BYTES:
        smaller = io.BytesIO()
        with Image.open(file.picture, formats=["PNG"]) as image:
            image.convert("RGB").save(smaller, "JPEG", quality=85)
        data, kind = smaller.getvalue(), "jpeg"
    return _image(data, kind, f"drawings, {file.stage}, step {file.step}")


def _answers(runs: Sequence[RunResults]) -> str:
    parts = []
    for run in runs:
        texts = {file: file.picture.with_suffix(".txt") for file in sample_files(run.folder / "samples")}
        read = {file: read_answers(text) for file, text in texts.items() if text.exists()}
        files = [file for file, prompts in read.items() if any(prompt.answers for prompt in prompts)]
        rows, groups = [], []
        for when, file in _ends(files):
            groups.append(len(rows))
            rows.append([f"{when}: {_place(file)}", "", "", ""])
            for prompt in read[file][:SHOWN_PROMPTS]:
                for number, (reward, answer) in enumerate(prompt.answers[:SHOWN_ANSWERS]):
                    asked = ["", ""] if number else [prompt.question, prompt.solution]
                    rows.append([*asked, answer, reward])
        if rows:
            header = ["question", "solution", "sampled answer", "reward"]
            parts.append(_heading(run, runs) + _table(header, rows, marked=groups, mark="group"))
    return "\n".join(parts)


def _ends(files: Sequence[SampleFile]) -> list[tuple[str, SampleFile]]:
    """The first and the last of them, as far as there are two."""
    return list(zip(("first", "last"), [*files[:1], *files[1:][-1:]], strict=False))


def _place(file: SampleFile) -> str:
    return f"{file.stage}, step {file.step}"


def _phases(runs: Sequence[RunResults]) -> str:
    parts = []
    for run in runs:
        by_stage: dict[str, list[StepRecord]] = {}
        for record in run.records:
            by_stage.setdefault(record.stage, []).append(record)
        phases = names_in(record.seconds for record in run.records)
        rows = [
            [
                phase,
                *(_number(_mean([record.seconds.get(phase, 0.0) for record in part])) for part in by_stage.values()),
            ]
            for phase in phases
        ]
        total = ["step", *(_number(_mean([record.step_seconds for record in part])) for part in by_stage.values())]
        if phases:
            parts.append(_heading(run, runs) + _table(["phase", *by_stage], [*rows, total], "numbers"))
    return '<p class="note">Mean seconds per step.</p>' + "\n".join(parts) if parts else ""


def _hardware(runs: Sequence[RunResults]) -> str:
    """Figures that at least one run knows; others are left out."""
    rows = []
    for name, value in HARDWARE.items():
        values = [value(run.records) for run in runs]
        if any(math.isfinite(one) for one in values):
            rows.append([name, *map(_number, values)])
    return _table(["figure", *(run.label for run in runs)], rows, "numbers") if rows else ""


def _settings(runs: Sequence[RunResults]) -> str:
    keys = names_in(run.settings for run in runs)
    rows = [[key, *(run.settings.get(key, NONE) for run in runs)] for key in keys]
    if not rows:
        return ""
    header = ["setting", *(run.label for run in runs)]
    different = [number for number, row in enumerate(rows) if len(set(row[1:])) > 1]
    shown = ""
    if len(runs) > 1:
        shown = "<p>No differences.</p>"
    if different:
        shown = "<h3>Differences</h3>" + _table(header, [rows[number] for number in different], "settings")
    whole = _table(header, rows, "settings", marked=different, mark="differs")
    return f"{shown}<details><summary>All {len(rows)} settings, as resolved</summary>{whole}</details>"


def _heading(run: RunResults, runs: Sequence[RunResults]) -> str:
    return f"<h3>{_escaped(run.label)}</h3>" if len(runs) > 1 else ""


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", *, marked: Sequence[int] = (), mark: str = ""
) -> str:
    """`kind` is the table's class, `mark` that of the rows numbered in `marked`."""
    head = "".join(f"<th>{_escaped(cell)}</th>" for cell in header)
    lines = [f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>']
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{_escaped(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{mark}">{cells}</tr>' if number in marked else f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _image(data: bytes, kind: str, text: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{_escaped(text)}">'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _number(value: float) -> str:
    if math.isnan(value):
        return NONE
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _per_second(records: Sequence[StepRecord], amount: Callable[[StepRecord], int]) -> float:
    """Of the steps that have any of it."""
    some = [record for record in records if amount(record)]
    seconds = sum(record.step_seconds for record in some)
    return sum(map(amount, some)) / seconds if seconds else math.nan


def _metric(name: str, fold: Callable[[list[float]], float]) -> Callable[[Sequence[StepRecord]], float]:
    def value(records: Sequence[StepRecord]) -> float:
        known = [record.metrics[name] for record in records if math.isfinite(record.metrics.get(name, math.nan))]
        return fold(known) if known else math.nan

    return value


HARDWARE: dict[str, Callable[[Sequence[StepRecord]], float]] = {
    "sampled tokens per second": lambda records: _per_second(records, lambda record: record.tokens),
    "drawings per second, of steps that draw": lambda records: _per_second(records, lambda record: record.images),
    "peak memory, GiB": lambda records: max((record.memory_gib for record in records), default=math.nan),
    "device memory, GiB, highest": _metric("device_memory_gib", max),
    "mean MFU": _metric("mfu", _mean),
    "mean power, W": _metric("power_w", _mean),
    "mean utilisation": _metric("utilisation", _mean),
    "energy, kJ": _metric("joules", lambda values: sum(values) / 1000),
    "mean joules per drawing": _metric("joules_per_image", _mean),
    "retried allocations": _metric("alloc_retries", sum),
    "out-of-memory errors": _metric("ooms", sum),
}
