"""A run that is killed in the middle of a step and resumed is, to the bit, the one that went through."""

import shutil

from fastcorl.config_loading import load_config
from fastcorl.pipeline import train
from fastcorl.trainer import Trainer
from tests.faults.recorded_run import recording
from tests.faults.resume_equality import SMALL
from tests.faults.run_states import compare_runs

FEW = [
    "--stages.unified.steps=3",
    "--stages.unified.prompts_per_step=2",
    "--stages.unified.beta=0.1",
    "--evaluation.every=0",
    "--evaluation.num_prompts=2",
    "--evaluation.scorer=None",
    "--checkpoint.every=1",
]


def test_a_resumed_run_equals_one_that_went_through(tmp_path, monkeypatch):
    lines = []
    for (owner, name), function in recording(lines.append).items():
        monkeypatch.setattr(owner, name, function)
    config, whole, killed = tmp_path / "small.yaml", tmp_path / "whole", tmp_path / "killed"
    config.write_text(SMALL.partition("  t2i:")[0])
    update = Trainer._update

    def copy_in_the_last(self, step, *arguments, **options):
        applied = update(self, step, *arguments, **options)
        if step == 3 and not killed.exists():
            shutil.copytree(whole, killed)  # what a kill leaves here
        return applied

    monkeypatch.setattr(Trainer, "_update", copy_in_the_last)
    train(load_config([f"--config={config}", f"--output_dir={whole}", *FEW]))
    train(load_config([f"--config={config}", f"--output_dir={killed}", "--resume=auto", *FEW]))
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    found = compare_runs(whole / "run", killed / "run")
    found.see(*lines[2:], "step 3")
    assert found.differences == []
    assert found.tensors > 100
