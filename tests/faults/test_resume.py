"""Resuming goes back to the right point, and refuses what it cannot continue."""

import shutil

import pytest
import torch

from fastcorl.config_loading import load_config
from fastcorl.errors import UserError
from fastcorl.resuming import Resumption, engine_facts
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.run_folder import RunFolder
from fastcorl.tasks import expand
from tests.faults.run_states import compare_runs
from tests.loop.launching import run_python

ALONE = Distributed(0, 1, torch.device("cpu"))

TINY = [
    "--threads=1",
    "--data.check_rows=used",
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


def check_same(finished, copy):
    """Figures, scores, exports and the last checkpoint, to the bit."""
    found = compare_runs(finished, copy)
    assert found.differences == []
    assert found.tensors > 1000


def test_resume_inside_a_stage_that_leaves_the_text_head_alone(finished, tmp_path):
    copy = copy_killed_in_t2i(finished, tmp_path)
    run_python(*TINY, f"--output_dir={tmp_path}", "--resume=auto")
    check_same(finished, copy)


@pytest.mark.slow
def test_resume_without_a_checkpoint_in_the_open_stage_keeps_finished_stages(finished, tmp_path):
    copy = copy_killed_in_t2i(finished, tmp_path)
    shutil.rmtree(copy / "checkpoints" / "step-3")
    run_python(*TINY, f"--output_dir={tmp_path}", "--resume=auto")
    check_same(finished, copy)


@pytest.mark.slow
def test_resume_from_a_named_checkpoint_trains_from_there_again(finished, tmp_path):
    copy = tmp_path / "quickstart"
    shutil.copytree(finished, copy)
    run_python(*TINY, f"--output_dir={tmp_path}", f"--resume={copy / 'checkpoints' / 'step-1'}")
    check_same(finished, copy)
    assert (copy / "export" / "abandoned-unified").exists()


def test_a_checkpoint_of_another_engine_is_refused(finished, tmp_path):
    copy_killed_in_t2i(finished, tmp_path)
    result = run_python(*TINY, f"--output_dir={tmp_path}", "--resume=auto", "--deepspeed.zero_stage=1", check=False)
    assert result.returncode == 2
    assert "engine plain" in result.stderr


def resumption(folder, **facts):
    """Of the run in `folder`, as an engine of other facts would find it."""
    config = load_config([*TINY, f"--output_dir={folder}", "--resume=auto"])
    facts = engine_facts(config, ALONE, launched=False) | facts
    return Resumption(config, expand(config), RunFolder(config), ALONE, facts)


def test_another_number_of_ranks_is_refused_inside_a_stage(finished, tmp_path):
    copy = copy_killed_in_t2i(finished, tmp_path)
    with pytest.raises(UserError) as refused:
        resumption(tmp_path, world_size=2)
    assert str(refused.value) == (
        f"resume: {copy / 'checkpoints' / 'step-3'} was written with world_size 1, this run has world_size 2: resume "
        "with what it was written with, or begin stage t2i anew in a run of another name, with stages.t2i.init "
        f"{copy / 'export' / 'unified'}"
    )


def test_another_number_of_ranks_begins_the_next_stage(finished, tmp_path):
    copy = copy_killed_in_t2i(finished, tmp_path)
    shutil.rmtree(copy / "checkpoints" / "step-3")  # what is left is of the stage that is finished
    assert resumption(tmp_path, world_size=2).finished == ["unified"]
