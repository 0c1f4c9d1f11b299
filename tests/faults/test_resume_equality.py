"""A run that is killed in a step, or in an evaluation, and resumed is to the bit the one that went through."""

import shutil

import pytest

from fastcorl.config_loading import load_config
from fastcorl.pipeline import Run, train
from fastcorl.trainer import Trainer
from tests.faults.recorded_run import recording
from tests.faults.resume_equality import SMALL
from tests.faults.run_states import compare_runs

FEW = [
    "--stages.unified.steps=3",
    "--stages.unified.prompts_per_step=2",
    "--stages.unified.beta=0.1",
    "--evaluation.every=2",
    "--evaluation.num_prompts=2",
    "--evaluation.scorer=None",
    "--checkpoint.every=1",
]


class Recorded:
    """A run that went through, and copies of its folder as a kill leaves it: {place: copy}."""

    def __init__(self, folder, patch):
        self.lines, self.copies, self.whole = [], {}, folder / "whole"
        self.config = folder / "small.yaml"
        self.config.write_text(SMALL.partition("  t2i:")[0])
        for (owner, name), function in recording(self.lines.append).items():
            patch.setattr(owner, name, function)
        update, evaluate = Trainer._update, Run._evaluate

        def updated(trainer, step, *arguments, **options):
            applied = update(trainer, step, *arguments, **options)
            if step == 3:
                self.copy("update")
            return applied

        def evaluated(run, label, *arguments):
            if label == "unified 2":
                self.copy("evaluation")
            return evaluate(run, label, *arguments)

        patch.setattr(Trainer, "_update", updated)
        patch.setattr(Run, "_evaluate", evaluated)
        self.train(self.whole)

    def copy(self, place):
        if place not in self.copies:
            self.copies[place] = self.whole.with_name(place)
            shutil.copytree(self.whole, self.copies[place])

    def train(self, folder, *options):
        train(load_config([f"--config={self.config}", f"--output_dir={folder}", *FEW, *options]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Recorded(tmp_path_factory.mktemp("runs"), patch)


@pytest.mark.parametrize("place", ["update", "evaluation"])
def test_a_resumed_run_equals_one_that_went_through(recorded, place):
    assert [line["step"] for line in recorded.lines[:3]] == [1, 2, 3]
    recorded.train(recorded.copies[place], "--resume=auto")
    found = compare_runs(recorded.whole / "run", recorded.copies[place] / "run")
    found.see(recorded.lines[2], recorded.lines[-1], "step 3")
    assert found.differences == []
    assert found.tensors > 100


def test_a_kill_in_an_evaluation_loses_no_step(recorded):
    assert (recorded.copies["evaluation"] / "run" / "checkpoints" / "step-2").is_dir()
