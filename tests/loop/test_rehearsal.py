"""The path of configs/janus_pro_1b with two ranks, on the files that `python -m fastcorl.rehearsal` makes."""

import io
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, JanusForConditionalGeneration

from fastcorl.records import Prompt
from fastcorl.rehearsal.__main__ import main as make_files
from fastcorl.rehearsal.data_sets import QUESTION_TYPES, make_rows
from fastcorl.rewards.answers.options import parse_options
from fastcorl.rewards.answers.rules import accuracy, is_well_formed
from fastcorl.rewards.captions.spice_py import SpicePy
from tests.loop.launching import read_metrics, run_deepspeed

DATA = {"unified": "x2x_rft_22k", "t2i": "x2x_rft_16k", "mc": "mcot_r1_mcq_66k", "oe": "mcot_r1_vqa_66k"}
DRAWING_REWARDS = {"cycle", "perceptual", "caption", "tim"}
ANSWER_REWARDS = {"accuracy", "format"}
SHORT = [
    "--config=configs/rehearsal.yaml",
    "--algorithm.group_size=2",
    "--data.held_out_rows=4",
    "--evaluation.num_prompts=2",
    "--checkpoint.every=0",
    "--logging.tensorboard=false",
]


@pytest.fixture(scope="module", params=[pytest.param("whole", marks=pytest.mark.slow)])
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    files, caches = folder / "files", folder / "caches"
    make_files(["--out", str(files)])
    arguments = [
        f"--output_dir={folder}",
        f"--model.path={files}/janus",
        f"--rewards.captioner={files}/blip-image-captioning-base",
        f"--rewards.lpips_trunk={files}/weights/vgg16-397923af.pth",
    ]
    for stage, name in DATA.items():
        arguments += [
            f"--stages.{stage}.{key}" for key in (f"data={files}/data/{name}", "steps=1", "prompts_per_step=2")
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(caches))
        patch.setenv("HF_HUB_OFFLINE", "1")
        run_deepspeed(*SHORT, *arguments, ranks=2)
    yield folder / "rehearsal"
    shutil.rmtree(folder)  # half a gigabyte


@pytest.fixture(scope="module")
def lines(finished_run):
    return {line["stage"]: line for line in read_metrics(finished_run)}


@pytest.mark.parametrize("name", list(QUESTION_TYPES))
def test_rows_can_be_answered_and_their_captions_scored(name):
    for row in make_rows(name, seed=0):
        image = Image.open(io.BytesIO(row["real_image"]["bytes"]))
        prompt = Prompt("0", row["prompt"], image, row["qa_problem"], row["qa_solution"], row["qa_type"])
        assert is_well_formed(row["qa_solution"])
        assert accuracy(row["qa_solution"], prompt) == 1
        assert accuracy("<answer>E</answer>", prompt) == 0
        assert set(parse_options(row["qa_problem"])) == (set("ABCD") if row["qa_type"] == "MC" else set())
        assert SpicePy()([row["prompt"]], [row["prompt"]]) == [1]
        assert image.format == "JPEG" and min(image.size) >= 375


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        make_files(["--out", str(tmp_path / "file" / "folder")])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_every_stage_is_scored_by_all_its_rewards(lines):
    assert list(lines) == list(DATA)
    parts = {"unified": DRAWING_REWARDS | ANSWER_REWARDS, "t2i": DRAWING_REWARDS}
    for stage, line in lines.items():
        assert set(line["rewards"]) == {"total"} | parts.get(stage, ANSWER_REWARDS)
        assert all(map(math.isfinite, line["rewards"].values())), line["rewards"]
        assert line["metrics"]["unscored_rows"] == 0


def test_every_stage_learns_from_something(lines):
    for line in lines.values():
        assert line["metrics"]["flat_groups"] < 1
        assert line["metrics"]["grad_norm"] > 0


def test_drawings_have_576_codes(lines):
    assert lines["t2i"]["images"] == 4
    assert lines["t2i"]["tokens"] == 4 * 576


def test_trained_log_probs_are_those_that_were_sampled(lines):
    """With guidance 5 drawings are sampled from another distribution than the policy, the conditional one."""
    for stage in ("unified", "t2i"):
        assert lines[stage]["metrics"]["image_mismatch"] < 1e-4
        assert lines[stage]["metrics"]["guidance_gap"] > 0.1
    for stage in ("unified", "mc", "oe"):
        assert lines[stage]["metrics"]["text_mismatch"] < 1e-4


def test_refined_stages_begin_at_their_reference(lines):
    assert "kl" not in lines["unified"]["metrics"]
    for stage in ("t2i", "mc", "oe"):
        assert lines[stage]["metrics"]["kl"] == pytest.approx(0, abs=1e-5)


def test_no_row_is_bad(finished_run):
    bad = finished_run / "bad_rows.jsonl"
    assert not bad.exists() or not bad.read_text()


def test_scores_and_samples_of_every_stage_are_kept(finished_run):
    scores = json.loads((finished_run / "scores.json").read_text())
    assert [entry["stage"] for entry in scores] == ["start", *DATA, "merge"]
    pictures = sorted((finished_run / "samples").glob("*.png"))
    assert [picture.stem.split("-")[1] for picture in pictures] == list(DATA)
    assert all(min(Image.open(picture).size) > 192 for picture in pictures)


def test_exports_are_what_transformers_reads(finished_run):
    weights = {}
    for stage in (*DATA, "merge"):
        folder = finished_run / "export" / stage
        janus, report = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert AutoProcessor.from_pretrained(folder).num_image_tokens == 576
        weights[stage] = janus.model.language_model.layers[0].mlp.down_proj.weight.detach().clone()
    for stage in ("t2i", "mc", "oe", "merge"):
        assert not torch.equal(weights[stage], weights["unified"]), stage
    assert not torch.equal(weights["merge"], weights["mc"])
