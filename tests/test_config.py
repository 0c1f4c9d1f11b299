"""Configurations from files and flags; `tests/faults/mistakes.py` has what can be wrong with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcorl.config_loading import load_config
from fastcorl.errors import UserError, main_guard

ROOT = Path(__file__).resolve().parent.parent
STAGE = "stages:\n  unified:\n    task: unified\n"


def fail(argv, capsys):
    """The one line that `argv` brings up."""
    with pytest.raises(SystemExit) as stop, main_guard():
        load_config(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert captured.err.startswith("fastcorl: ")
    return captured.err.strip()


def write(folder, text, name="x.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_quickstart_is_the_default():
    config = load_config([])
    assert config == load_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    assert list(config.stages) == ["unified", "t2i", "mc", "oe", "merge"]


@pytest.mark.parametrize(
    ("argv", "read", "value"),
    [
        (["--algorithm.group_size", "4"], lambda c: c.algorithm.group_size, 4),
        (["--algorithm.group-size=4"], lambda c: c.algorithm.group_size, 4),
        (["--stages.unified.steps", "10"], lambda c: c.stages["unified"].steps, 10),
        (["--stages.mc.beta", "None"], lambda c: c.stages["mc"].beta, None),
        (["--algorithm.eps_low", "0.1", "--algorithm.eps_high", "0.2"], lambda c: c.algorithm.eps_high, 0.2),
        (["--name", "5"], lambda c: c.name, "5"),
        (["--resume", "auto"], lambda c: c.resume, "auto"),
        (["--resume", "None"], lambda c: c.resume, None),
        (["--logging.tensorboard", "False"], lambda c: c.logging.tensorboard, False),
        (["--optimizer.betas", "0.8", "0.9"], lambda c: c.optimizer.betas, (0.8, 0.9)),
        (["--stages.merge.merge", "oe", "mc"], lambda c: c.stages["merge"].merge, ["oe", "mc"]),
        (["--data.columns", "prompt", "text"], lambda c: c.data.columns, {"prompt": "text"}),
        (["--rewards.extra", "my.module:fun", "0.5"], lambda c: c.rewards.extra, {"my.module:fun": 0.5}),
        (["--seed", "1", "--seed", "2"], lambda c: c.seed, 2),
        (["--local_rank=0", "--seed", "3"], lambda c: c.seed, 3),
        (["--local_rank", "1", "--seed", "3"], lambda c: c.seed, 3),
    ],
)
def test_overrides(argv, read, value):
    assert read(load_config(argv)) == value


def test_extends_is_a_deep_merge_along_a_chain(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, STAGE + "seed: 1\noptimizer:\n  eps: 1e-6\n  warmup_steps: 1\n", "base.yaml")
    write(tmp_path, "extends: ../base.yaml\noptimizer:\n  warmup_steps: 2\n", "deep/middle.yaml")
    top = write(tmp_path, "extends: deep/middle.yaml\nseed: 3\nstages:\n  unified:\n    steps: 7\n")
    config = load_config(["--config", top])
    assert (config.seed, config.optimizer.eps, config.optimizer.warmup_steps) == (3, 1e-6, 2)
    assert (config.stages["unified"].task, config.stages["unified"].steps) == ("unified", 7)


def test_yaml_aliases_do_not_share_overrides(tmp_path):
    path = write(tmp_path, "stages:\n  a: &x\n    task: mc\n  b: *x\n")
    config = load_config(["--config", path, "--stages.a.steps", "9"])
    assert (config.stages["a"].steps, config.stages["b"].steps) == (9, 100)


def test_flags_go_over_the_files_values_before_anything_is_validated(tmp_path):
    path = write(tmp_path, STAGE + "algorithm:\n  eps_low: 0.1\ndata:\n  columns:\n    prompt: text\n")
    config = load_config(["--config", path, "--algorithm.eps_high", "0.2", "--data.columns", "real_image", "picture"])
    assert config.algorithm.eps_high == 0.2
    assert config.data.columns == {"prompt": "text", "real_image": "picture"}


def test_a_mistake_is_blamed_on_the_extended_file_that_has_it(tmp_path, capsys):
    base = write(tmp_path, STAGE + "sed: 1\n", "base.yaml")
    top = write(tmp_path, "extends: base.yaml\nseed: 2\n", "top.yaml")
    assert fail(["--config", top], capsys) == f"fastcorl: {base}: sed: unknown key, did you mean 'seed'?"


@pytest.mark.parametrize(("rank", "local_rank", "told"), [("1", None, ""), ("1", "1", ""), ("8", "0", "fastcorl: x\n")])
def test_only_the_first_rank_of_a_host_prints(monkeypatch, capsys, rank, local_rank, told):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as stop, main_guard():
        raise UserError("x")
    assert stop.value.code == 2
    assert capsys.readouterr().err == told


def run(*command, folder=ROOT):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK")}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("form", [["fastcorl/train.py"], ["-m", "fastcorl.train"]])
def test_train_reports_in_one_line(form):
    result = run(*form, "--optimizer.learning_rat", "1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "did you mean '--optimizer.learning_rate'?" in result.stderr


def test_train_runs_from_another_folder(tmp_path):
    result = run(str(ROOT / "fastcorl" / "train.py"), "--seed", "x", folder=tmp_path)
    assert (result.returncode, result.stderr) == (2, "fastcorl: --seed: must be a whole number, got 'x'\n")


def test_help_lists_everything_without_torch():
    code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    result = run("-c", code + "runpy.run_path('fastcorl/train.py', run_name='__main__')", "--help")
    assert result.stdout.endswith("\nFalse\n")
    assert result.returncode == 0
    for option in ("--optimizer.learning_rate", "--stages.unified.steps", "--deepspeed.zero_stage"):
        assert option in result.stdout


def test_loading_imports_no_torch():
    code = "import sys, fastcorl.config_loading as c; c.load_config([]); assert 'torch' not in sys.modules"
    assert run("-c", code).returncode == 0


def test_later_files_lie_over_earlier_ones(tmp_path):
    first = write(tmp_path, STAGE + "seed: 1\nrollout:\n  guidance: 2\n", "first.yaml")
    second = write(tmp_path, "seed: 2\nrollout:\n  temperature: 0.5\n", "second.yaml")
    config = load_config(["--config", first, second, "--name", "both"])
    assert (config.seed, config.rollout.guidance, config.rollout.temperature) == (2, 2, 0.5)
    assert config.name == "both"
