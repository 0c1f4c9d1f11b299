"""Both stages end to end through the real launcher with two ranks, and what a user finds afterwards."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from transformers import JanusForConditionalGeneration

from tests.loop.launching import read_metrics, run_deepspeed

SHORT = [
    "--stages.unified.steps=1",
    "--stages.t2i.steps=1",
    "--stages.mc.steps=1",
    "--stages.oe.steps=2",
    "--evaluation.num_prompts=8",
    "--logging.samples_every=1",
    "--checkpoint.every=1",
    "--checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    result = run_deepspeed(*SHORT, f"--output_dir={folder}", ranks=2)
    return folder / "quickstart", result.stdout + result.stderr


def test_run_folder_is_complete(finished_run):
    folder, _ = finished_run
    files = ("config.yaml", "metrics.jsonl", "scores.json", "scores.md", "report.png", "report.html")
    for name in (*files, "tensorboard", "samples"):
        assert (folder / name).exists(), name
    assert {path.name for path in (folder / "export").iterdir()} == {"unified", "t2i", "mc", "oe", "merge"}
    assert len(list((folder / "samples").glob("*.png"))) == 5


def test_metrics_tell_the_whole_story(finished_run):
    folder, _ = finished_run
    lines = read_metrics(folder)
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("unified", 1),
        ("t2i", 1),
        ("mc", 1),
        ("oe", 1),
        ("oe", 2),
    ]
    unified, t2i, mc = lines[:3]
    assert {"total", "cycle", "tim", "accuracy", "format", "caption", "perceptual"} <= set(unified["rewards"])
    assert {"rollout", "score", "pack", "train"} <= set(unified["seconds"])
    assert unified["images"] == 64
    assert "kl" not in unified["metrics"]
    assert t2i["metrics"]["kl"] == pytest.approx(0, abs=1e-5)
    assert "cycle" not in mc["rewards"]
    # What was sampled is what is trained: both log-probs agree up to rounding.
    assert unified["metrics"]["image_mismatch"] < 1e-4
    assert unified["metrics"]["text_mismatch"] < 1e-4


def test_scores_of_every_stage_are_kept(finished_run):
    folder, output = finished_run
    stages = [entry["stage"] for entry in json.loads((folder / "scores.json").read_text())]
    assert stages == ["start", "unified", "t2i", "mc", "oe", "merge"]
    assert "held-out scores, merge" in output


def test_every_export_has_a_card_with_its_scores(finished_run):
    folder, _ = finished_run
    came_from = {"unified": "unified", "t2i": "unified | t2i", "merge": "unified | mc | oe | merge"}
    for stage, columns in came_from.items():
        card = (folder / "export" / stage / "README.md").read_text()
        assert f"| score | start | {columns} | change |" in card
        assert str(folder) not in card


def test_what_an_export_says_of_loading_it_with_transformers_works(finished_run, tmp_path, monkeypatch):
    folder = finished_run[0] / "export" / "merge"
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    torch.manual_seed(0)
    exec(code.replace('"owner/name"', repr(str(folder))).replace("a caption", "a red three at top left"), names)
    assert isinstance(names["model"], JanusForConditionalGeneration)
    assert names["codes"].shape == (1, 64)
    with Image.open("drawing.png") as drawing:
        assert drawing.size == (32, 32) and max(high for _, high in drawing.getextrema()) > 128
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_resume_continues_to_the_same_end(tmp_path, finished_run):
    """A run stopped after step 1 of the last stage and resumed writes the metrics of the run that was not."""
    reference, _ = finished_run
    copy = tmp_path / "quickstart"
    shutil.copytree(reference, copy)
    for stage in ("oe", "merge"):
        shutil.rmtree(copy / "export" / stage)
    shutil.rmtree(copy / "checkpoints" / "step-5")
    run_deepspeed(*SHORT, f"--output_dir={tmp_path}", "--resume=auto", ranks=2)
    before, after = read_metrics(reference), read_metrics(copy)
    assert [line["rewards"] for line in before] == [line["rewards"] for line in after]
    assert [line["metrics"]["loss"] for line in before] == [line["metrics"]["loss"] for line in after]
    assert before[:4] == after[:4] and before[4]["seconds"] != after[4]["seconds"]
