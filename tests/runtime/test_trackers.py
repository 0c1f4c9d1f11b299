import inspect
import io
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from rich.console import Console

from fastcorl.config import LoggingConfig
from fastcorl.errors import UserError
from fastcorl.runtime.telemetry import Telemetry
from fastcorl.runtime.trackers import STEP
from tests.loop.launching import run_python
from tests.runtime import tracker_stand_ins

STAGES = {"unified": 2, "t2i": 2}
ALL = LoggingConfig(wandb=True, trackio=True)
SETTINGS = {"optimizer": {"learning_rate": 1e-3}}
GRID = np.zeros((8, 12, 3), "uint8")


@pytest.fixture
def wandb(monkeypatch):
    module = tracker_stand_ins.make_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def trackio(monkeypatch):
    module = tracker_stand_ins.make_trackio()
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def open_run(folder, config=ALL, is_main=True) -> Telemetry:
    folder.mkdir(exist_ok=True)
    return Telemetry(folder, config, STAGES, is_main, Console(file=io.StringIO()))


def printed(telemetry: Telemetry) -> list[str]:
    return telemetry.console.file.getvalue().splitlines()


def test_all_trackers_show_the_same(tmp_path, record, wandb, trackio):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_run(tmp_path / "one") as telemetry:
        assert telemetry.start_trackers(SETTINGS) is None
        telemetry.write(record("t2i", 1, 2, scores={"digit": 0.5}))
        telemetry.image("samples/t2i", GRID, 3)
    (numbers, step), (picture, picture_step) = trackio.runs[0].logged
    assert step == picture_step == 3
    assert numbers["scores/digit"] == 0.5 and numbers["memory/gib"] == 1.53 and "rewards/cycle" in numbers
    assert picture["samples/t2i"].value is GRID
    (same, _), (same_picture, _) = wandb.runs[0].logged
    assert same == {**numbers, STEP: 3}
    assert same_picture["samples/t2i"].value is GRID and same_picture[STEP] == 3
    assert wandb.runs[0].defined == {"*": STEP}
    events = reader.EventAccumulator(str(tmp_path / "one" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(numbers)
    assert {name: events.Scalars(name)[0].value for name in numbers} == pytest.approx(numbers, rel=1e-6)
    assert [event.step for event in events.Images("samples/t2i")] == [3]
    for module in (wandb, trackio):
        (arguments,) = module.arguments
        assert arguments["project"] == "fastcorl" and arguments["config"] == SETTINGS
    assert wandb.arguments[0]["name"] == "one" and wandb.arguments[0]["dir"] == str(tmp_path / "one")
    assert wandb.runs[0].finished == 0 and trackio.runs[0].finished


def test_a_resumed_run_goes_on_where_it_was_watched(tmp_path, record, wandb, trackio):
    for steps in ((1, 2), (2,)):
        with open_run(tmp_path / "one") as telemetry:
            if steps == (2,):
                telemetry.truncate_after(list(STAGES), "unified", 1)
            telemetry.start_trackers(SETTINGS)
            for step in steps:
                telemetry.write(record("unified", step, 2))
    first, second = wandb.arguments
    assert first["id"] == second["id"] and len(wandb.store) == len(trackio.store) == 1
    assert trackio.arguments[0]["name"] == trackio.arguments[1]["name"] == f"one-{first['id']}"
    assert [values[STEP] for values, _ in wandb.runs[1].logged] == [1, 2, 2]
    assert [step for _, step in trackio.runs[1].logged] == [1, 2, 2]


def test_runs_of_one_name_are_watched_apart(tmp_path, wandb, trackio):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        with open_run(tmp_path / parent / "same") as telemetry:
            telemetry.start_trackers({})
    assert len(wandb.store) == len(trackio.store) == 2


def test_only_the_main_rank_is_watched(tmp_path, record, wandb, trackio):
    with open_run(tmp_path / "one", is_main=False) as telemetry:
        assert telemetry.start_trackers(SETTINGS) is None
        telemetry.write(record())
        telemetry.image("samples", GRID, 1)
    assert not wandb.runs and not trackio.runs and not list((tmp_path / "one").iterdir())


@pytest.mark.parametrize("is_main", [True, False])
def test_what_is_not_installed_is_told_on_every_rank(tmp_path, monkeypatch, is_main):
    monkeypatch.setattr("fastcorl.plugins.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^logging.trackio: trackio is not installed .*--logging.trackio false"):
        open_run(tmp_path, LoggingConfig(tensorboard=False, trackio=True), is_main)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_folder_that_wandb_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="wandb is not installed"):
        open_run(tmp_path / "one", LoggingConfig(wandb=True))


def test_what_cannot_start_is_one_line_before_the_run(tmp_path, wandb, trackio):
    trackio.failure = ConnectionError("no\nnetwork")
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "one") as telemetry:
        problem = telemetry.start_trackers(SETTINGS)
        assert problem == "logging.trackio: trackio cannot start: no network; --logging.trackio false does without"
        raise ZeroDivisionError
    assert wandb.runs[0].finished == 1  # W&B shows the run as failed


def test_what_fails_later_is_one_line_and_the_run_goes_on(tmp_path, record, wandb, trackio):
    with open_run(tmp_path / "one", LoggingConfig(tensorboard=False, wandb=True, trackio=True)) as telemetry:
        telemetry.start_trackers(SETTINGS)
        wandb.runs[0].log = None
        for step in (1, 2):
            telemetry.write(record("unified", step, 2))
        trackio.runs[0].finish = None
    warnings = [line for line in printed(telemetry) if "left out" in line]
    assert [line.split()[0] for line in warnings] == ["wandb", "trackio"]
    assert len(trackio.runs[0].logged) == 2
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_stand_ins_have_the_signatures_of_the_packages(name):
    real, stand_in = pytest.importorskip(name), getattr(tracker_stand_ins, f"make_{name}")()
    for path in ("init", "Image", "Run.log", "Run.finish", *(["Run.define_metric"] if name == "wandb" else [])):
        ours, theirs = stand_in, real
        for part in path.split("."):
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        known = inspect.signature(theirs).parameters
        for parameter in inspect.signature(ours).parameters:
            assert parameter in known or path == "Image", (path, parameter)


def test_packages_themselves_take_a_run(tmp_path, record, monkeypatch):
    pytest.importorskip("wandb")
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    storage = sys.modules["trackio.sqlite_storage"]
    project = f"fastcorl-test-{os.getpid()}"
    config = LoggingConfig(tensorboard=False, wandb=True, trackio=True, project=project)
    try:
        for step in (1, 2):
            with open_run(tmp_path / "one", config) as telemetry:
                assert telemetry.start_trackers(SETTINGS) is None
                telemetry.write(record("unified", step, 2))
                telemetry.image("samples/unified", GRID, step)
            assert not any("left out" in line for line in printed(telemetry))
        identity = (tmp_path / "one" / "tracker_id").read_text()
        (name,) = storage.SQLiteStorage.get_runs(project)
        assert name == f"one-{identity}"
        logged = storage.SQLiteStorage.get_logs(project, name)
        assert [entry["step"] for entry in logged if "metrics/loss" in entry] == [1, 2]
        assert len(list((tmp_path / "one" / "wandb").glob(f"offline-run-*-{identity}"))) == 2
    finally:
        trackio.delete_project(project, force=True)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_training_ends_before_it_begins(tmp_path):
    result = run_python("--logging.wandb=true", "--threads=1", f"--output_dir={tmp_path}", check=False)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastcorl:")]
    assert "logging.wandb: wandb is not installed" in line
    assert not list(tmp_path.iterdir())
