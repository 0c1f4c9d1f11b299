"""Every option of a run, on the shipped model for a few small steps, through the code that `train.py` runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastcorl.config_loading import load_config
from fastcorl.model import load_policy
from fastcorl.model.loading import QUICKSTART_WEIGHTS
from fastcorl.pipeline import Run, train
from fastcorl.runtime.distributed import Distributed
from tests.loop.launching import SMALL_RUN, read_metrics

ALONE = Distributed(0, 1, torch.device("cpu"))
BASE = f"""
extends: {SMALL_RUN}
rollout: {{max_new_tokens: 24}}
algorithm: {{group_size: 4}}
optimizer: {{warmup_steps: 0, learning_rate: 1e-3}}
checkpoint: {{every: 0}}
"""
UNIFIED = "stages:\n  unified: {task: unified, steps: 2, prompts_per_step: 2}\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train `stages` with options; returns the run's folder and the lines of metrics.jsonl."""
    count = 0
    monkeypatch.setattr(Run, "_report", lambda _: None)  # half of a small run's time

    def run(*options, stages=UNIFIED):
        nonlocal count
        count += 1
        file = tmp_path / f"{count}.yaml"
        file.write_text(BASE + stages)
        train(load_config(["--config", str(file), f"--output_dir={tmp_path / str(count)}", *options]))
        folder = tmp_path / str(count) / "run"
        return folder, read_metrics(folder) if (folder / "metrics.jsonl").exists() else []

    return run


def losses(lines):
    return [(line["metrics"]["loss"], line["metrics"]["grad_norm"], line["rewards"]) for line in lines]


def test_adapters_are_trained_merged_and_their_own_reference(run, tmp_path):
    stages = UNIFIED + "  oe: {task: oe, init: unified, steps: 2, prompts_per_step: 2, beta: 0.1}\n"
    lora = ["--model.lora.rank=4", "--model.lora.targets", "q_proj", "down_proj"]
    folder, lines = run(*lora, stages=stages)
    assert all(line["metrics"]["image_mismatch"] < 1e-4 for line in lines[:2])
    assert all(line["metrics"]["text_mismatch"] < 1e-4 for line in lines)
    assert lines[2]["metrics"]["kl"] == pytest.approx(0, abs=1e-6) and lines[3]["metrics"]["kl"] > 1e-6
    start = load_file(QUICKSTART_WEIGHTS / "janus" / "model.safetensors")
    trained = load_file(folder / "export" / "unified" / "model.safetensors")
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name].float())}
    assert len(changed) == 8 and all(".q_proj." in name or ".down_proj." in name for name in changed)
    assert (folder / "export" / "oe" / "adapter" / "adapter_model.safetensors").exists()
    assert not load_policy(folder / "export" / "oe").has_adapters


@pytest.mark.slow
def test_where_the_reference_is_kept_makes_no_difference(run):
    stages = "stages:\n  oe: {task: oe, steps: 3, prompts_per_step: 2, beta: 0.1}\n"
    kept, offloaded, swapped = (
        run(f"--algorithm.reference={where}", stages=stages)[1] for where in ("keep", "offload", "swap")
    )
    assert kept[2]["metrics"]["kl"] > 1e-6
    assert losses(kept) == losses(offloaded) == losses(swapped)
    assert [line["metrics"]["kl"] for line in kept] == [line["metrics"]["kl"] for line in swapped]


@pytest.mark.parametrize("where", [pytest.param("keep", marks=pytest.mark.slow), "swap"])
def test_a_frozen_matching_reward_does_not_drift(run, where):
    """The same drawings, since nothing is learnt from other rewards: what is compared is the first step's and a late
    one's reward of a policy that has changed."""
    stages = "stages:\n  t2i: {task: t2i, steps: 2, prompts_per_step: 2}\n"
    weights = ["--rewards.weights", "cycle", "0", f"--algorithm.reference={where}"]
    _, live = run(*weights, stages=stages)
    _, frozen = run(*weights, "--rewards.tim=frozen", stages=stages)
    assert live[0]["rewards"]["tim"] == pytest.approx(frozen[0]["rewards"]["tim"], abs=1e-6)
    assert live[1]["rewards"]["tim"] != pytest.approx(frozen[1]["rewards"]["tim"], abs=1e-6)


@pytest.mark.parametrize("anchor", ["recomputed", "sampled"])
def test_several_updates_per_rollout_drift_from_their_anchor(run, anchor):
    clip = ["--algorithm.eps_low=0.2", "--algorithm.eps_high=0.2", "--algorithm.delta=4"]
    folder, lines = run("--algorithm.num_iterations=3", f"--algorithm.old_log_probs={anchor}", *clip)
    for line in lines:
        assert line["metrics"]["image_drift"] > 1e-4 and line["metrics"]["text_drift"] > 1e-4
        assert line["metrics"]["image_ratio_max"] > 1


def test_options_from_neighbouring_work_train(run):
    """GDPO, C3PO and RL-PLUS at once; what each does is tested where it lives."""
    options = [
        "--algorithm.advantage_mode=normalize_then_sum",
        "--algorithm.loss_type=dapo",
        "--algorithm.token_budget=40",
        "--algorithm.external=true",
        "--algorithm.dynamic_sampling=1",
    ]
    _, lines = run(*options)
    for line in lines:
        assert math.isfinite(line["metrics"]["loss"]) and line["metrics"]["grad_norm"] > 0
        assert line["images"] == 8  # the data's own pictures are not counted as drawn
        assert line["metrics"]["image_mismatch"] < 1e-4


def test_what_was_sampled_stays_the_anchor_beside_rows_of_the_data(run):
    """Both options at once: the sampled rows' first ratio is to what was sampled, which the trained forward equals."""
    _, lines = run("--algorithm.external=true", "--algorithm.old_log_probs=sampled")
    assert lines[0]["metrics"]["image_mismatch"] < 1e-4
    assert lines[0]["metrics"]["image_ratio_max"] == pytest.approx(1, abs=1e-3)


def test_the_start_policy_leaves_memory_before_the_stages(tmp_path, monkeypatch):
    import gc
    import weakref

    from fastcorl.pipeline import Run

    file = tmp_path / "x.yaml"
    file.write_text(BASE + UNIFIED)
    started = Run(load_config(["--config", str(file), f"--output_dir={tmp_path}"]), ALONE, launched=False)
    policy = weakref.ref(started.start_policy)
    seen = []
    monkeypatch.setattr(Run, "_run_stages", lambda run: (gc.collect(), seen.append(policy())))
    monkeypatch.setattr(Run, "_report", lambda run: None)
    started.train()
    assert seen == [None]


def test_drawing_alone_needs_no_questions(run, tmp_path):
    from datasets import Dataset, Image

    from fastcorl.quickstart.data import train as scenes

    rows = [{name: scenes()[index][name] for name in ("prompt", "real_image")} for index in range(20)]
    Dataset.from_list(rows).cast_column("real_image", Image()).to_parquet(tmp_path / "drawings.parquet")
    stages = "stages:\n  t2i: {task: t2i, steps: 1, prompts_per_step: 2}\n"
    data = [f"--data.train={tmp_path / 'drawings.parquet'}", "--data.held_out=None", "--data.held_out_rows=4"]
    folder, lines = run(*data, "--evaluation.scorer=fastcorl.quickstart.scorer:Scorer", stages=stages)
    assert len(lines) == 1
    assert all("accuracy" not in entry["scores"] for entry in json.loads((folder / "scores.json").read_text()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rewards.weights", "accuracy", "0", "format", "0", "cycle", "0", "tim", "0"], "no reward with a weight"),
        (["--evaluation.gradient_cosine=true"], "gradient_cosine is logged at the steps of `every`"),
        (["--stages.unified.probe_steps=2"], "probe_steps is for task ordered"),
        (["--evaluation.every=1", "--evaluation.gradient_cosine=true", "--deepspeed.zero_stage=3"], "under ZeRO 3"),
        (["--data.held_out=nowhere.jsonl"], "data.held_out nowhere.jsonl"),
        (["--evaluation.scorer=nowhere:Scorer"], "evaluation.scorer"),
        (["--stages.unified.init=a/b"], "no model folder 'a/b'"),
        (["--algorithm.pair_similarity=true"], "needs a column pair_similarity"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_mistakes_are_told_before_anything_is_trained(run, tmp_path, options, words, dry, monkeypatch):
    from fastcorl.errors import UserError

    if dry:
        from fastcorl.dry_run import describe_run

        monkeypatch.setattr("tests.loop.test_options.train", describe_run)
    with pytest.raises(UserError, match=words):
        run(*options)
    assert not list(tmp_path.glob("*/run"))


def test_resuming_with_other_adapters_is_refused(run, tmp_path):
    from fastcorl.errors import UserError

    stages = "stages:\n  oe: {task: oe, steps: 2, prompts_per_step: 2}\n"
    run("--model.lora.rank=4", "--checkpoint.every=1", stages=stages)
    checkpoint = tmp_path / "1" / "run" / "checkpoints" / "step-1"
    with pytest.raises(UserError, match="with lora rank 4 .* this run has lora rank 8"):
        run("--model.lora.rank=8", f"--resume={checkpoint}", stages=stages)


def test_pair_similarity_needs_its_column(run):
    from fastcorl.errors import UserError

    with pytest.raises(UserError, match="algorithm.pair_similarity needs a column pair_similarity"):
        run("--algorithm.pair_similarity=true")


def test_probes_log_both_abilities_and_the_gradients_cosine(run):
    probe = ["--evaluation.every=1", "--evaluation.gradient_cosine=true", "--evaluation.scorer"]
    folder, lines = run(*probe, "fastcorl.quickstart.scorer:Scorer")
    assert {"overall", "accuracy"} <= lines[0]["scores"].keys()
    assert all(-1 <= line["metrics"]["gradient_cosine"] <= 1 for line in lines)
    assert all(line["metrics"]["image_gradient_norm"] > 0 for line in lines)
    stages = [entry["stage"] for entry in json.loads((folder / "scores.json").read_text())]
    assert stages == ["start", "unified 1", "unified"]


def test_ranges_and_flat_groups_of_every_reward_are_logged(run):
    _, lines = run()
    for name in ("total", "cycle", "perceptual", "caption", "tim", "accuracy", "format"):
        low, high = lines[0]["metrics"][f"{name}/min"], lines[0]["metrics"][f"{name}/max"]
        assert low <= lines[0]["rewards"][name] <= high
        assert 0 <= lines[0]["metrics"][f"{name}/flat"] <= 1
        assert lines[0]["metrics"][f"{name}/unscored"] == 0


@pytest.mark.slow
def test_an_ordered_stage_measures_its_order(run):
    stages = "stages:\n  refine: {task: ordered, order: [t2i, mc, oe], probe_steps: 1, steps: 1, prompts_per_step: 2}\n"
    folder, lines = run(stages=stages)
    found = json.loads((folder / "order-refine.json").read_text())
    assert sorted(found["order"]) == ["mc", "oe", "t2i"]
    assert found["transfer"].keys() == {"t2i", "mc", "oe"}
    assert [line["stage"] for line in lines] == ["refine_1", "refine_2", "refine_3"]
    for line, task in zip(lines, found["order"], strict=True):
        assert ("tim" in line["rewards"]) == (task == "t2i")
    assert load_policy(folder / "export" / "refine_3").num_image_tokens == 64


@pytest.mark.slow
def test_models_are_merged_from_folders_by_every_method(run):
    start = QUICKSTART_WEIGHTS / "janus"
    folder, _ = run()
    stages = "stages:\n"
    for method in ("gaussian", "linear", "ties"):
        stages += f"  {method}: {{task: merge, merge: [{start}, {folder}/export/unified], method: {method}}}\n"
    merged, _ = run(stages=stages)
    tuned, base = (load_file(path / "model.safetensors") for path in (folder / "export" / "unified", start))
    name = "lm_head.weight"
    linear = load_file(merged / "export" / "linear" / "model.safetensors")[name]
    torch.testing.assert_close(linear, (tuned[name] + base[name].float()) / 2)
    for method in ("gaussian", "ties"):
        other = load_file(merged / "export" / method / "model.safetensors")[name]
        assert not torch.equal(other, linear)


def test_data_streams_with_bad_rows_and_holds_some_out(run, tmp_path):
    from datasets import Dataset, Image

    from fastcorl.quickstart.data import train as scenes

    rows = [dict(scenes()[index]) for index in range(60)]
    table = Dataset.from_list(rows).cast_column("real_image", Image())
    table = table.cast_column("real_image", Image(decode=False)).to_list()
    for index in (3, 17):
        table[index]["real_image"]["bytes"] = table[index]["real_image"]["bytes"][:40]
    Dataset.from_list(table).to_parquet(tmp_path / "rows.parquet")
    source = [f"--data.train={tmp_path / 'rows.parquet'}", "--data.held_out=None", "--data.held_out_rows=4"]
    source.append("--data.check_rows=all")
    allowed = [*source, "--data.max_bad_fraction=0.1"]
    streamed, lines = run(*allowed, "--data.streaming=true", "--data.shuffle_buffer=16")
    assert len(lines) == 2
    looked, _ = run(*allowed)
    bad = [json.loads(line) for line in (looked / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in bad] == ["3", "17"] and all(row["column"] == "real_image" for row in bad)
    from fastcorl.errors import UserError

    with pytest.raises(UserError, match="row 3: real_image.*2 of 60 rows are bad"):
        run(*source)


def test_a_users_reward_that_fails_is_told_and_ends_the_run_in_the_end(run, capsys):
    from fastcorl.rewards import RewardFailure

    name = "tests.rewards.suite_functions"
    stages = "stages:\n  oe: {task: oe, steps: 8, prompts_per_step: 2}\n"
    with pytest.raises(RewardFailure, match="failed in 5 of its last 5 calls"):
        run("--rewards.extra", f"{name}:broken", "1", stages=stages)
    assert "step 1: reward tests.rewards.suite_functions:broken failed" in capsys.readouterr().out
    folder, lines = run("--rewards.extra", f"{name}:half", "1", "--stages.oe.steps=1", stages=stages)
    assert lines[0]["rewards"][f"{name}:half"] == 0.5


def test_the_policy_recaptions_its_own_drawings(run):
    stages = "stages:\n  t2i: {task: t2i, steps: 2, prompts_per_step: 2}\n"
    _, lines = run("--rewards.captioner=policy", "--rewards.caption_similarity", "jaccard", stages=stages)
    assert all(0 <= line["rewards"]["caption"] <= 1 for line in lines)


def test_a_folder_that_is_not_there_is_told(run):
    from fastcorl.errors import UserError

    with pytest.raises(UserError, match="stages.unified: there is no model folder './nowhere'"):
        run("--stages.unified.init=./nowhere")
    assert not Path("nowhere").exists()
