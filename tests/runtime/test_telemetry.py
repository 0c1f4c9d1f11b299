import io
import json
import math
import time

import numpy as np
import pytest
from rich.console import Console

from fastcorl.config import LoggingConfig
from fastcorl.runtime.telemetry import (
    PhaseTimer,
    Telemetry,
    duration,
    peak_memory_gib,
    read_records,
    step_line,
)

QUIET = LoggingConfig(tensorboard=False)
STAGES = {"unified": 40, "t2i": 20, "merge": 0, "mc": 20}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def lines_of(run_dir) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_records_survive_the_file(tmp_path, record):
    written = [record(step=step) for step in (1, 2)] + [record("t2i", 1, 20, scores={"digit": 0.5})]
    with Telemetry(tmp_path, QUIET, STAGES, True, plain_console()) as telemetry:
        for one in written:
            telemetry.write(one)
            assert read_records(tmp_path)[-1] == one  # each step is on disk at once
    assert read_records(tmp_path) == written


def test_numbers_that_json_lacks(tmp_path, record):
    odd = {"loss": math.nan, "kl": math.inf, "grad_norm": -math.inf}
    with Telemetry(tmp_path, QUIET, STAGES, True, plain_console()) as telemetry:
        telemetry.write(record(metrics=odd, rewards={"cycle": math.nan}))
    (line,) = lines_of(tmp_path)
    assert line["metrics"] == {"loss": "NaN", "kl": "Infinity", "grad_norm": "-Infinity"}
    (back,) = read_records(tmp_path)
    assert math.isnan(back.metrics["loss"]) and back.metrics["kl"] == math.inf and math.isnan(back.rewards["cycle"])


@pytest.mark.parametrize("force_colour", ["", "1"])
def test_without_a_terminal_one_plain_line_per_step(tmp_path, record, monkeypatch, capsys, force_colour):
    monkeypatch.setenv("FORCE_COLOR", force_colour)
    with Telemetry(tmp_path, QUIET, STAGES, True) as telemetry:
        telemetry.note("starts at step 0 [of many]")
        for step in (1, 2, 3):
            telemetry.write(record(step=step))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed
    first, *steps = printed.splitlines()
    assert first == "starts at step 0 [of many]" and len(steps) == 3
    assert all(len(line) > 80 for line in steps)
    for word in ("unified 3/40", "cycle", "loss", "kl_image", "tok/s", "img/s", "rollout", "GiB", "ETA"):
        assert word in steps[-1]


def test_terminal_gets_lines_above_a_bar(tmp_path, record):
    screen = Console(file=Terminal(), width=120)
    with Telemetry(tmp_path, QUIET, STAGES, True, screen) as telemetry:
        telemetry.write(record(step=1))
        telemetry.write(record(step=2))
    shown = screen.file.getvalue()
    assert "\x1b[" in shown and "1/80" in shown and "2/80" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is given back


def test_only_the_main_rank_writes(tmp_path, record):
    console = plain_console()
    with Telemetry(tmp_path / "run", LoggingConfig(), STAGES, False, console) as telemetry:
        telemetry.write(record())
        telemetry.note("hello")
        telemetry.truncate_after(list(STAGES), "unified", 0)
        assert telemetry.start_trackers({}) is None
    assert not (tmp_path / "run").exists() and console.file.getvalue() == ""


@pytest.mark.parametrize(("stage", "step", "left"), [("unified", 0, 0), ("unified", 2, 2), ("t2i", 1, 4), ("mc", 9, 5)])
def test_truncation(tmp_path, record, stage, step, left):
    written = [record("unified", 1), record("unified", 2), record("unified", 3), record("t2i", 1), record("t2i", 2)]
    with Telemetry(tmp_path, QUIET, STAGES, True, plain_console()) as telemetry:
        for one in written:
            telemetry.write(one)
        telemetry.truncate_after(list(STAGES), stage, step)
        assert read_records(tmp_path) == written[:left]
        telemetry.write(record("mc", 10))
    assert read_records(tmp_path) == [*written[:left], record("mc", 10)]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path, record):
    with Telemetry(tmp_path, QUIET, STAGES, True, plain_console()) as telemetry:
        telemetry.write(record(step=1))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "uni')
    assert read_records(tmp_path) == [record(step=1)]
    with Telemetry(tmp_path, QUIET, STAGES, True, plain_console()) as telemetry:
        telemetry.write(record(step=2))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_scores_join_the_last_record(tmp_path, record):
    with Telemetry(tmp_path, QUIET, STAGES, True, plain_console()) as telemetry:
        first, second = record(step=1), record(step=2)
        telemetry.write(first)
        telemetry.write(second)
        second.scores = {"digit": 0.5}
        telemetry.add_scores(second)
        telemetry.write(record(step=3))
    assert read_records(tmp_path) == [first, second, record(step=3)]


def test_a_record_that_a_full_disk_refuses_is_written_with_the_next(tmp_path, record):
    telemetry = Telemetry(tmp_path, QUIET, STAGES, True, plain_console())
    telemetry.write(record(step=1))
    telemetry.close()
    full = FullDisk()
    telemetry._metrics = io.TextIOWrapper(io.BufferedWriter(full), encoding="utf-8")
    telemetry.write(record(step=2))
    assert "metrics.jsonl could not be written: [Errno 28]" in telemetry.console.file.getvalue()
    full.room = True
    telemetry.write(record(step=3))
    assert [json.loads(line)["step"] for line in full.written.splitlines()] == [2, 3]


class FullDisk(io.RawIOBase):
    written, room = b"", False

    def writable(self):
        return True

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        self.written += bytes(data)
        return len(data)


def test_tensorboard_counts_through_stages_and_purges(tmp_path, record):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    grid = np.zeros((8, 12, 3), "uint8")
    for resumed in (False, True):
        with Telemetry(tmp_path, LoggingConfig(), STAGES, True, plain_console()) as telemetry:
            if resumed:
                telemetry.truncate_after(list(STAGES), "unified", 40)
            assert telemetry.start_trackers({}) is None
            if not resumed:
                telemetry.write(record("unified", 40))
            for step in (1, 2):
                telemetry.write(record("t2i", step, 20, scores={"digit": 0.5}))
            telemetry.image("samples", grid, telemetry.global_step("t2i", 2))
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"rewards/cycle", "metrics/loss", "seconds/rollout", "scores/digit", "throughput/tokens_per_second"} <= tags
    assert [event.step for event in events.Scalars("rewards/cycle")] == [40, 41, 42]
    assert [event.step for event in events.Images("samples")] == [42]


def test_phases_add_up_to_wall_clock():
    timer = PhaseTimer()
    start = time.perf_counter()
    with timer.phase("rollout"):
        time.sleep(0.02)
        with timer.phase("score"):
            time.sleep(0.03)
    with pytest.raises(RuntimeError), timer.phase("update"):
        raise RuntimeError
    with timer.phase("rollout"):
        time.sleep(0.01)
    wall = time.perf_counter() - start
    seconds = timer.take()
    assert list(seconds) == ["rollout", "score", "update"]
    assert seconds["rollout"] >= 0.03 and seconds["score"] >= 0.03
    assert sum(seconds.values()) == pytest.approx(wall, abs=5e-3)
    assert timer.take() == {}


def test_hidden_work_is_no_phase():
    timer = PhaseTimer()
    with timer.phase("rollout"):
        timer.hide("score", 2.0)
        timer.hide("score", 1.0)
    assert list(timer.take()) == ["rollout"]
    assert timer.take_hidden() == {"score_hidden_seconds": 3.0}
    assert timer.take_hidden() == {}


def test_peak_memory_is_this_process():
    assert 0.05 < peak_memory_gib() < 64


def test_a_step_without_time_or_scores(record):
    line = step_line(record(seconds={}, metrics={}, rewards={}, memory_gib=math.nan), math.nan)
    assert line == "unified 1/40 | 0 tok/s 0.0 img/s | 0.00 s | nan GiB | ETA ?"


def test_a_step_shows_what_the_hardware_told(record):
    metrics = {"mfu": 0.4567, "power_w": 2751.4, "joules_per_image": 1234.5}
    assert " img/s MFU 45.7% 1,234 J/img 2,751 W | " in step_line(record(metrics=metrics), 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3900, "1h05m"), (183_600, "2d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
