"""The shipped configurations and presets resolve, hold the values they are named after, and can be planned offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcorl import train
from fastcorl.config_loading import load_config
from fastcorl.errors import UserError
from fastcorl.memory import estimate, workload
from fastcorl.model.known import known_config
from fastcorl.model.loading import empty_policy
from tests.data.examples import numbered, write_parquet

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PRESETS = CONFIGS / "presets"
BASES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != PRESETS)
JANUS_1B = sorted((CONFIGS / "janus_pro_1b").glob("*.yaml"))
JANUS = [*JANUS_1B, *sorted((CONFIGS / "janus_pro_7b_lora").glob("*.yaml"))]
TRAINED = ("unified", "refine_t2i", "refine_mc", "refine_oe")
SIZES = {
    "mm-vl/x2x_rft_22k": 22479,
    "mm-vl/x2x_rft_16k": 16000,
    "mm-vl/mcot_r1_mcq_66k": 66000,
    "mm-vl/mcot_r1_vqa_66k": 66000,
}


def load(*files, options=()):
    return load_config(["--config", *map(str, files), *options])


def short(path):
    return str(path.relative_to(CONFIGS)) if isinstance(path, Path) else None


@pytest.mark.parametrize("path", BASES, ids=short)
def test_every_configuration_resolves(path):
    if path == CONFIGS / "janus_pro_1b" / "base.yaml":  # has no stage of its own
        with pytest.raises(UserError, match="stages"):
            load(path)
    else:
        assert load(path).stages


@pytest.mark.parametrize("path", [path for path in JANUS if path.stem != "base"], ids=short)
def test_the_paper_lies_over_every_stage(path):
    plain, config = load(path), load(path, PRESETS / "paper.yaml")
    assert config.stages == plain.stages and config.model == plain.model and config.data == plain.data
    rewards, algorithm = config.rewards, config.algorithm
    assert (rewards.captioner, rewards.caption_similarity) == ("Salesforce/blip-image-captioning-base", ["spice"])
    assert (rewards.image_similarity, rewards.scaling, rewards.scaling_of) == ("lpips_vgg", "unit", {})
    assert (rewards.accuracy, rewards.answer_weight, rewards.weights) == ("strict", 0.8, {})
    assert (algorithm.eps_low, algorithm.eps_high, algorithm.delta) == (None, None, None)
    assert (algorithm.loss_type, algorithm.num_iterations, config.rollout.max_new_tokens) == ("grpo", 1, 512)
    assert config.optimizer.betas == (0.9, 0.999)
    assert not config.compat.ulm_r1_image_shift


@pytest.mark.parametrize(
    ("file", "stage", "group", "beta", "prompt", "batch", "rate"),
    [
        ("unified", "unified", 8, 0, 1024, 16, 4e-6),
        ("refine_t2i", "t2i", 16, 0.02, 256, 16, 1e-6),
        ("refine_mc", "mc", 16, 0.02, 1024, 32, 1e-6),
        ("refine_oe", "oe", 16, 0.02, 1024, 32, 1e-6),
    ],
)
def test_table_5(file, stage, group, beta, prompt, batch, rate):
    config = load(CONFIGS / "janus_pro_1b" / f"{file}.yaml", PRESETS / "paper.yaml")
    found = config.stages[stage]
    assert (found.group_size, found.beta, found.prompts_per_step) == (group, beta, batch)
    assert (found.learning_rate, config.data.max_prompt_tokens) == (rate, prompt)


def test_the_public_codes_values():
    config = load(CONFIGS / "janus_pro_1b" / "unified.yaml", PRESETS / "ulm_r1.yaml")
    stage, rewards, optimizer = config.stages["unified"], config.rewards, config.optimizer
    assert list(config.stages) == ["unified"]
    assert (stage.prompts_per_step, stage.group_size, stage.beta, stage.learning_rate) == (32, 8, 0, 4e-6)
    assert (rewards.caption_similarity, rewards.bert_layer, rewards.scaling) == (["bertscore"], 12, "none")
    assert (rewards.image_similarity, rewards.accuracy, rewards.answer_weight) == ("lpips_vgg", "soft_jaccard", 0.8)
    assert (config.rollout.max_new_tokens, config.rollout.guidance, config.rollout.temperature) == (576, 5, 1)
    assert (config.algorithm.policy_logits, config.algorithm.loss_type) == ("cond", "grpo")
    assert (optimizer.betas, optimizer.warmup_steps, optimizer.schedule) == ((0.9, 0.999), 0, "linear")
    assert config.compat.ulm_r1_image_shift
    assert set(config.data.templates.values()) == {"{question}"}


@pytest.mark.parametrize("preset", ["ulm_r1", "lora_24gb"])
@pytest.mark.parametrize("stage", TRAINED[1:])
def test_presets_of_the_unified_stage_refuse_others(stage, preset):
    with pytest.raises(UserError, match=rf"{preset}\.yaml: stages\.unified\.task"):
        load(CONFIGS / "janus_pro_1b" / f"{stage}.yaml", PRESETS / f"{preset}.yaml")


EPOCHS = [[path] for path in JANUS if path.stem in TRAINED]
EPOCHS.append([CONFIGS / "janus_pro_1b" / "unified.yaml", PRESETS / "ulm_r1.yaml"])


@pytest.mark.parametrize("files", EPOCHS, ids=lambda files: short(files[-1]))
def test_a_stage_is_one_epoch(files):
    config = load(*files)
    (stage,) = config.stages.values()
    rows = stage.steps * stage.prompts_per_step
    assert rows == pytest.approx(SIZES[stage.data or config.data.train], rel=0.02)


def memory(config):
    """GiB on a single GPU without ZeRO, as the dry run prints them."""
    (stage,) = config.stages.values()
    policy = empty_policy(known_config("deepseek-community/Janus-Pro-1B"), torch.bfloat16)
    lora = config.model.lora
    if lora.rank:
        policy.add_adapters(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    work = workload(config, stage, policy, 1, config.data.max_prompt_tokens)
    return {
        name: values[0]
        for name, values in estimate(config, policy, work, world_size=1, reference=bool(stage.beta)).items()
    }


def small(stage):
    """A stage of Janus-Pro-1B for 24 GB: the preset, or for a refined one the options that docs/paper.md gives."""
    path = CONFIGS / "janus_pro_1b" / f"{stage}.yaml"
    if stage == "unified":
        return load(path, PRESETS / "lora_24gb.yaml")
    line = next(line for line in (ROOT / "docs" / "paper.md").read_text().splitlines() if line.startswith('L="'))
    options = line.split('"')[1].split()
    return load(path, options=[*options, f"--stages.{stage.removeprefix('refine_')}.learning_rate", "1e-4"])


@pytest.mark.parametrize("stage", TRAINED)
def test_lora_fits_24_gb(stage):
    config = small(stage)
    judges = 0.9 + 64 * 0.042 + 16 * 0.16  # BLIP with its captions' keys and values, VGG
    assert memory(config)["total"] + judges < 20
    assert memory(load(CONFIGS / "janus_pro_1b" / f"{stage}.yaml"))["total"] > 24
    # There is room for a guided drawing, which takes two rows, and for the longest question with its answer.
    longest = config.data.max_prompt_tokens + 576
    assert config.rollout.max_rows >= 2 and config.rollout.kv_cache_tokens >= 2 * longest
    assert config.packing.tokens >= longest
    (trained,) = config.stages.values()
    assert trained.learning_rate == 1e-4 and config.model.lora.rank == 64


def test_a_dry_run_needs_no_network(tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "empty"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "fastcorl/train.py", "--config", "configs/janus_pro_1b/unified.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "deepseek-community/Janus-Pro-1B: 2,076,636,811 parameters, 1,652,656,128 of them trained" in done.stdout
    for row in ("weights", "KV cache", "activations", "total on 8", "1400", "16 x 8"):
        assert row in done.stdout
    for missing in ("model.path", "data.train mm-vl/x2x_rft_22k", "rewards.captioner", "rewards.lpips_trunk"):
        assert f"to do  {missing}" in done.stdout
    assert done.stdout.endswith("dry run: nothing was trained\n")


def dry_run(monkeypatch, *argv):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv), "--dry-run"])
    train.main()


def plan(*options):
    return ["--config", CONFIGS / "janus_pro_1b" / "unified.yaml", "--model.path", "quickstart", *options]


def test_a_dry_run_on_files_reads_them(tmp_path, monkeypatch, capsys):
    rows = write_parquet(tmp_path / "rows.parquet", numbered(20))
    trunk = tmp_path / "vgg16.pth"
    trunk.touch()
    dry_run(monkeypatch, *plan("--data.train", rows, "--rewards.lpips_trunk", trunk))
    printed = " ".join(capsys.readouterr().out.split())
    assert "rows.parquet: 16 rows read" in printed  # a step's
    assert "longest caption" in printed and "0 tokens" not in printed.partition("longest caption")[2][:40]
    assert "to do rewards.captioner" in printed and "lpips_trunk" not in printed
    assert printed.endswith("dry run: nothing was trained")


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--data.train", "nowhere/rows.parquet", "data.train"),
        ("--model.path", "/nowhere/janus", "model.path: there is no folder '/nowhere/janus'"),
        ("--rewards.extra", ("no.such.module:reward", "1"), "rewards.extra"),
    ],
)
def test_a_dry_run_on_what_is_not_there_fails(option, value, line, tmp_path, monkeypatch, capsys):
    rows = write_parquet(tmp_path / "rows.parquet", numbered(4))
    values = value if isinstance(value, tuple) else (value,)
    with pytest.raises(SystemExit) as stop:
        dry_run(monkeypatch, *plan("--data.train", rows, option, *values))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"fastcorl: {line}") and error.count("\n") == 1
