import io
import json
import math
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console

from fastcorl.config import LoggingConfig
from fastcorl.runtime.report import draw_report, print_scores, score_table
from fastcorl.runtime.telemetry import Telemetry

STAGES = {"unified": 60, "t2i": 40, "mc": 30, "oe": 30}
SCORES = [
    {"stage": "start", "scores": {"digit": 0.412, "colour": 0.8, "overall": 0.3, "accuracy": 0.5, "mc": 0.55}},
    {"stage": "unified", "scores": {"digit": 0.5, "colour": 0.85, "overall": 0.4, "accuracy": 0.6, "mc": 0.6}},
    {"stage": "merge", "scores": {"digit": 0.617, "colour": 0.75, "overall": 0.5, "accuracy": 0.7}},
]


def fill(run_dir, record, stages) -> None:
    with Telemetry(run_dir, LoggingConfig(tensorboard=False), stages, True, Console(file=io.StringIO())) as telemetry:
        for stage, total in stages.items():
            for step in range(1, total + 1):
                telemetry.write(record(stage, step, total))


@pytest.mark.parametrize("stages", [STAGES, {"unified": 1}, {}])
@pytest.mark.parametrize("scores", [SCORES, []])
def test_report_opens(tmp_path, record, stages, scores):
    fill(tmp_path, record, stages)
    if scores:
        (tmp_path / "scores.json").write_text(json.dumps(scores))
    path = draw_report(tmp_path)
    assert path == tmp_path / "report.png"
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 1000


def test_report_of_numbers_that_are_none(tmp_path, record):
    with Telemetry(tmp_path, LoggingConfig(tensorboard=False), {"unified": 3}, True, Console(quiet=True)) as telemetry:
        for step in (1, 2, 3):
            telemetry.write(record(step=step, rewards={"cycle": math.nan}, metrics={"kl": math.inf}, seconds={}))
    assert draw_report(tmp_path).exists()


def test_markdown_table():
    lines = score_table(SCORES).splitlines()
    assert lines[0] == "| score | start | unified | merge | change |"
    assert lines[1] == "|---|---:|---:|---:|---:|"
    assert "| digit | 41.2 | 50.0 | 61.7 | +20.5 |" in lines
    assert "| colour | 80.0 | 85.0 | 75.0 | -5.0 |" in lines
    assert "| mc | 55.0 | 60.0 | – | – |" in lines


def test_a_single_evaluation_has_no_change():
    assert "change" not in score_table(SCORES[:1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_printed_table(count):
    console = Console(file=io.StringIO(), width=80)
    print_scores(SCORES[:count], console)
    assert ("+20.5" in console.file.getvalue()) == (count == 3)


def test_matplotlib_is_not_imported_before_it_is_needed():
    code = "import sys, fastcorl.runtime.report, fastcorl.runtime.samples; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
