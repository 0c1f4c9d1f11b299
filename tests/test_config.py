"""Every mistake in a configuration is one line on stderr that names the place, and exit code 2."""

import os
import subprocess
import sys
import time
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


FLAG_MISTAKES = [
    (["--algorithm.group_size", "1"], "--algorithm.group_size: must be at least 2, got '1'"),
    (["--optimizer.learning_rat", "1"], "unknown option, did you mean '--optimizer.learning_rate'?"),
    (["--learning_rate", "1"], "--learning_rate: unknown option, did you mean '--optimizer.learning_rate'?"),
    (["--keep=1"], "--keep: unknown option, did you mean '--checkpoint.keep'?"),
    (["--xyzzy", "1"], "--xyzzy: unknown option; --help lists all"),
    (["--stages.unifid.steps", "1"], "did you mean '--stages.unified.steps'?"),
    (["--algorithm.group_size", "many"], "--algorithm.group_size: must be a whole number, got 'many'"),
    (["--algorithm.group_size", "2.5"], "--algorithm.group_size: must be a whole number, got '2.5'"),
    (["--algorithm.group_size", "None"], "--algorithm.group_size: must be a whole number, got 'None'"),
    (["--rollout.temperature", "nan"], "--rollout.temperature: must be a finite number, got 'nan'"),
    (["--logging.tensorboard", "maybe"], "--logging.tensorboard: must be true or false, got 'maybe'"),
    (["--model.dtype", "float23"], "got 'float23', did you mean 'float32'?"),
    (["--seed"], "Missing value for argument '--seed'"),
    (["--seed", "-5"], "--seed: must be at least 0, got '-5'"),
    (["--seed", "1", "2"], "unexpected argument '2'"),
    (["--optimizer", "1"], "--optimizer: is a section"),
    (["--optimizer.betas", "0.9"], "--optimizer.betas: needs more than 1 values"),
    (["--data.columns", "prompt"], "--data.columns: Failed to parse key-value pairs"),
    (["--data.columns", "promt", "x"], "--data.columns: 'promt' is none of our columns"),
    (["--data.templates", "MC", "{q} {question}"], "MC: must have no braces but those of {question}"),
    (["--algorithm.eps_low", "0.1"], "--algorithm.eps_low: eps_low and eps_high must be given together"),
    (["--stages.mc.init", "unifid"], "--stages.mc.init: 'unifid' is not an earlier stage"),
    (["--name", "../x"], "must be the name of a folder"),
    (["--config", "no/such.yaml"], "no/such.yaml: no such file"),
    (["--config"], "--config: needs the path of a YAML file"),
    (["seed=1"], "unexpected argument 'seed=1'"),
]


@pytest.mark.parametrize(("argv", "expected"), FLAG_MISTAKES, ids=[" ".join(argv) for argv, _ in FLAG_MISTAKES])
def test_mistaken_flags(argv, expected, capsys):
    assert expected in fail(argv, capsys)


FILE_MISTAKES = [
    (STAGE + "optimizer:\n  learning_rat: 1\n", "optimizer.learning_rat: unknown key, did you mean 'learning_rate'?"),
    (STAGE + "learning_rate: 1\n", "learning_rate: unknown key, did you mean 'optimizer.learning_rate'?"),
    (STAGE + "zzz: 1\n", "zzz: unknown key (known here: name,"),
    (STAGE.replace("task", "tsk"), "stages.unified.tsk: unknown key, did you mean 'task'? (and 1 more)"),
    (STAGE + "    steps: ten\n", "stages.unified.steps: must be a whole number, got 'ten'"),
    (STAGE + "    steps: true\n", "stages.unified.steps: takes no true or false, got true"),
    (STAGE + "    steps: 0\n    prompts_per_step: 0\n", "steps: must be more than 0, got 0 (and 1 more)"),
    (STAGE + "    merge: [a, b]\n", "stages.unified: merge must name stages for task merge"),
    (STAGE + "name: 5\n", "name: must be text, got 5"),
    (STAGE + "name:\n", "name: must be text, got null"),
    (STAGE + "optimizer: fast\n", "optimizer: must be a mapping of keys, got 'fast'"),
    (STAGE + "optimizer:\n  learning_rate: .inf\n", "optimizer.learning_rate: must be a finite number, got inf"),
    (STAGE + "1: 2\n", "1: must be a name, got 1"),
    (STAGE + "seed: 1\nseed: 2\n", "line 5: not valid YAML: key 'seed' is given twice"),
    ("seed: 1\n", "stages: missing"),
    ("stages: {}\n", "stages: must name at least one stage"),
    ("stages:\n  ../x:\n    task: mc\n", "stages.../x: a stage's name has letters"),
    ("a: [1\n", "line 2: not valid YAML"),
    ("a: !!python/name:os.system x\n", "not valid YAML"),
    ("- 1\n- 2\n", "must be a mapping of sections, but holds a list"),
    ("", "must be a mapping of sections, but is empty"),
    ("extends: y.yaml\n", "extends: "),
    ("extends: x.yaml\n", "already part of this chain"),
    ("extends: [a]\n", "extends: must be the path of another file"),
]


@pytest.mark.parametrize(("text", "expected"), FILE_MISTAKES, ids=[expected for _, expected in FILE_MISTAKES])
def test_mistaken_files(text, expected, tmp_path, capsys):
    path = write(tmp_path, text)
    line = fail(["--config", path], capsys)
    assert line.startswith(f"fastcorl: {path}: ")
    assert expected in line


def test_binary_file_and_folder(tmp_path, capsys):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not a UTF-8 text file" in fail(["--config", str(tmp_path / "x.yaml")], capsys)
    assert "Is a directory" in fail(["--config", str(tmp_path)], capsys)


def test_a_mistake_is_blamed_on_the_extended_file_that_has_it(tmp_path, capsys):
    base = write(tmp_path, STAGE + "sed: 1\n", "base.yaml")
    top = write(tmp_path, "extends: base.yaml\nseed: 2\n", "top.yaml")
    assert fail(["--config", top], capsys) == f"fastcorl: {base}: sed: unknown key, did you mean 'seed'?"


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, main_guard():
        raise UserError("x")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


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


def test_help_is_quick_and_lists_everything():
    start = time.perf_counter()
    result = run("fastcorl/train.py", "--help")
    assert time.perf_counter() - start < 2
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
