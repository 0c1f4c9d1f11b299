"""Steps that are not finite, SIGTERM and a full disk, met by a run on the shipped model in this process."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastcorl.algorithm import CoRLObjective
from fastcorl.config_loading import load_config
from fastcorl.errors import UserError
from fastcorl.experience import Collector
from fastcorl.pipeline import Run, train
from fastcorl.rollout import RolloutEngine
from fastcorl.runtime.checkpoints import problem_of
from tests.loop.launching import SMALL_RUN, read_metrics

SMALL = f"""
extends: {SMALL_RUN}
optimizer: {{warmup_steps: 0, learning_rate: 1e-3}}
stages:
  unified: {{task: unified, steps: 4, prompts_per_step: 2}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train with options; a run that ends early raises."""
    monkeypatch.setattr(Run, "_report", lambda _: None)  # half of a small run's time

    def run(*options, later=""):
        (tmp_path / "small.yaml").write_text(SMALL + later)
        train(load_config(["--config", str(tmp_path / "small.yaml"), f"--output_dir={tmp_path}", *options]))

    return run


@pytest.fixture
def at_call(monkeypatch):
    """`at_call(owner, name, calls, change)`: what the method returns in those of its calls goes through `change`."""

    def patch(owner, name, calls, change):
        real, count = getattr(owner, name), 0

        def call(*arguments, **options):
            nonlocal count
            count += 1
            result = real(*arguments, **options)
            return change(result) if count in calls else result

        monkeypatch.setattr(owner, name, call)

    return patch


def spoilt(result):
    loss, losses = result
    return loss * torch.nan, losses


def terminated(result):
    os.kill(os.getpid(), signal.SIGTERM)
    return result


def weights(tmp_path, step):
    return load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "train_state.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def steps_saved(tmp_path):
    folders = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert not list((tmp_path / "run" / "checkpoints").glob("tmp-*"))
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders if problem_of(folder) is None)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_in_its_metrics(run, at_call, tmp_path, capsys):
    at_call(CoRLObjective, "forward", [2], spoilt)
    with pytest.raises(UserError, match="unified step 2: not applied, weights are as before: the loss is nan"):
        run()
    first, second = read_metrics(tmp_path / "run")
    assert math.isfinite(first["metrics"]["loss"]) and "skipped_updates" not in first["metrics"]
    assert second["metrics"]["loss"] == "NaN" and second["metrics"]["skipped_updates"] == 1
    assert "unified 2/4" in capsys.readouterr().out
    assert steps_saved(tmp_path) == [1]


def test_a_stop_loses_no_step_between_checkpoints(run, at_call, tmp_path):
    """Nothing is lost by going on with `skip`."""
    at_call(CoRLObjective, "forward", [3], spoilt)
    with pytest.raises(UserError, match="unified step 3: not applied"):
        run("--checkpoint.every=100")
    assert steps_saved(tmp_path) == [2]
    run("--checkpoint.every=100", "--resume=auto")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_skipped_steps_change_no_bit_and_remove_no_checkpoint(run, at_call, tmp_path, capsys):
    at_call(CoRLObjective, "forward", [2, 3], spoilt)
    states = {}

    def look(result):
        states.update({step: weights(tmp_path, step) for step in steps_saved(tmp_path)})
        return result

    at_call(CoRLObjective, "forward", [4], look)
    run("--optimizer.on_nonfinite=skip", "--checkpoint.keep=1")
    assert list(states) == [1, 2, 3]  # what 2 and 3 saved removed nothing
    assert same(states[1], states[2]) and same(states[1], states[3])
    assert not same(states[1], weights(tmp_path, 4))
    assert steps_saved(tmp_path) == [4]
    assert [line["metrics"].get("skipped_updates", 0) for line in read_metrics(tmp_path / "run")] == [0, 1, 1, 0]
    assert "2 of at most 3 times in a row" in capsys.readouterr().out


def test_a_fourth_skip_in_a_row_stops_the_run(run, at_call, tmp_path):
    at_call(CoRLObjective, "forward", [1, 2, 3, 4], spoilt)
    with pytest.raises(UserError, match="for the 4th time in a row"):
        run("--optimizer.on_nonfinite=skip")
    assert len(read_metrics(tmp_path / "run")) == 4


def test_sigterm_before_an_update_gives_the_step_up_and_resuming_takes_it_again(run, at_call, tmp_path, capsys):
    at_call(Collector, "_sample", [2], terminated)
    with pytest.raises(SystemExit) as exit_info:
        run("--checkpoint.every=100")
    assert exit_info.value.code == 143
    assert steps_saved(tmp_path) == [1]
    assert "SIGTERM ends the run after step 1" in capsys.readouterr().out
    run("--checkpoint.every=100", "--resume=auto", "--stages.unified.steps=2")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_sigterm_in_an_update_waits_for_it(run, at_call, tmp_path):
    at_call(CoRLObjective, "forward", [2], terminated)
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 143
    assert steps_saved(tmp_path) == [1, 2]


def test_sigterm_outside_the_steps_ends_at_once(run, at_call, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    at_call(RolloutEngine, "generate", [1], terminated)
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 143
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_checkpoint_that_cannot_be_written(run, monkeypatch, tmp_path, capsys, on_failure):
    from safetensors import SafetensorError
    from safetensors import torch as writer

    real, calls = writer.save_file, 0

    def save_file(tensors, path):
        nonlocal calls
        calls += 1
        if calls == 2:
            path.write_bytes(b"the beginning")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(writer, "save_file", save_file)
    if on_failure == "stop":
        with pytest.raises(UserError, match="step 2: no checkpoint was written.*No space left"):
            run("--checkpoint.on_failure=stop", "--stages.unified.steps=3")
        assert steps_saved(tmp_path) == [1]
    else:
        run("--stages.unified.steps=3")
        assert "unified step 2: no checkpoint was written, older ones are as they were" in capsys.readouterr().out
        assert steps_saved(tmp_path) == [1, 3]


def test_what_a_killed_run_left_half_done_is_removed(run, tmp_path, capsys):
    run("--stages.unified.steps=2")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "tmp-3").mkdir()
    (folder / "tmp-3" / "train_state.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "export" / "unified").rename(tmp_path / "run" / "export" / "tmp-unified")
    (folder / "step-2" / "train_state.safetensors").write_bytes(b"")
    run("--stages.unified.steps=2", "--resume=auto")
    assert "step-2 is not used: train_state.safetensors has 0 bytes" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["abandoned-step-2", "latest", "step-1", "step-2"]
    assert (tmp_path / "run" / "export" / "unified").is_dir()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_checkpoints_ahead_of_where_the_run_goes_on_are_moved_aside(run, tmp_path):
    """Else the next resume would go back to them, and they would count among the newest."""
    later = "  later: {task: unified, init: unified, steps: 1, prompts_per_step: 2}\n"
    run("--stages.unified.steps=2", later=later)
    shutil.rmtree(tmp_path / "run" / "export" / "unified")  # to train it again
    run("--stages.unified.steps=1", "--resume=auto", later=later)
    assert steps_saved(tmp_path) == [1, 2]
    position = json.loads((tmp_path / "run" / "checkpoints" / "step-2" / "position.json").read_text())
    assert (position["stage"], position["step"]) == ("later", 1)
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == [
        "abandoned-later",
        "later",
        "unified",
    ]


def test_a_folder_that_a_run_is_writing_to_is_left_to_it(run, at_call, tmp_path):
    def another(result):
        for options in ((), ("--resume=auto",)):
            with pytest.raises(UserError, match=r"run: a run is writing to it \(process \d+ on .*--name"):
                run("--stages.unified.steps=2", *options)
        return result

    at_call(CoRLObjective, "forward", [1], another)
    run("--stages.unified.steps=2")
    assert steps_saved(tmp_path) == [1, 2]
    assert not (tmp_path / "run-1").exists() and not (tmp_path / "run" / "lock").exists()


def test_a_full_disk_costs_samples_and_scores_but_not_the_run(run, monkeypatch, tmp_path, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastcorl.pipeline.save_samples", full)
    run("--stages.unified.steps=2", "--logging.samples_every=1")
    assert "samples could not be written: [Errno 28] No space left on device" in capsys.readouterr().out
    assert steps_saved(tmp_path) == [1, 2]


def test_a_finished_stage_that_is_to_have_more_steps_stays_as_it_is_and_says_so(run, tmp_path, capsys):
    run("--stages.unified.steps=1")
    run("--stages.unified.steps=3", "--resume=auto")
    assert "unified: is finished after 1 steps and is not trained on to 3; --resume" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "run")) == 1
