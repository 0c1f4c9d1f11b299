"""Resuming goes back to the right point, and refuses what it cannot continue."""

import json
import shutil

import pytest

from tests.loop.launching import read_metrics, run_python

TINY = [
    "--threads=1",
    *(f"--stages.{stage}.prompts_per_step=2" for stage in ("unified", "t2i", "mc", "oe")),
    "--algorithm.group_size=2",
    "--stages.unified.steps=2",
    "--stages.t2i.steps=2",
    "--stages.mc.steps=1",
    "--stages.oe.steps=1",
    "--evaluation.num_prompts=2",
    "--logging.samples_every=0",
    "--logging.tensorboard=false",
    "--checkpoint.every=1",
    "--checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_python(*TINY, f"--output_dir={folder}")
    return folder / "quickstart"


def copy_killed_in_t2i(finished, tmp_path):
    """The run as a kill after the first step of t2i leaves it."""
    copy = tmp_path / "quickstart"
    shutil.copytree(finished, copy)
    for stage in ("t2i", "mc", "oe", "merge"):
        shutil.rmtree(copy / "export" / stage)
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if int(checkpoint.name.split("-")[1]) > 3:
            shutil.rmtree(checkpoint)
    return copy


def same(before, after):
    return [(line["stage"], line["step"], line["rewards"], line["metrics"]["loss"]) for line in before] == [
        (line["stage"], line["step"], line["rewards"], line["metrics"]["loss"]) for line in after
    ]


def test_resume_inside_a_stage_that_leaves_the_text_head_alone(finished, tmp_path):
    copy = copy_killed_in_t2i(finished, tmp_path)
    run_python(*TINY, f"--output_dir={tmp_path}", "--resume=auto")
    assert same(read_metrics(finished), read_metrics(copy))
    assert json.loads((copy / "scores.json").read_text()) == json.loads((finished / "scores.json").read_text())


def test_resume_without_a_checkpoint_in_the_open_stage_keeps_finished_stages(finished, tmp_path):
    copy = copy_killed_in_t2i(finished, tmp_path)
    shutil.rmtree(copy / "checkpoints" / "step-3")
    run_python(*TINY, f"--output_dir={tmp_path}", "--resume=auto")
    assert same(read_metrics(finished), read_metrics(copy))


def test_resume_from_a_named_checkpoint_trains_from_there_again(finished, tmp_path):
    copy = tmp_path / "quickstart"
    shutil.copytree(finished, copy)
    run_python(*TINY, f"--output_dir={tmp_path}", f"--resume={copy / 'checkpoints' / 'step-1'}")
    assert same(read_metrics(finished), read_metrics(copy))
    assert (copy / "export" / "abandoned-unified").exists()


def test_a_checkpoint_of_another_engine_is_refused(finished, tmp_path):
    copy_killed_in_t2i(finished, tmp_path)
    result = run_python(*TINY, f"--output_dir={tmp_path}", "--resume=auto", "--deepspeed.zero_stage=1", check=False)
    assert result.returncode == 2
    assert "engine plain" in result.stderr
