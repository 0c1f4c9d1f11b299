"""The same training whatever the engine: plain torch, ZeRO 0 to 3, one rank or two."""

import pytest

from tests.loop.launching import read_metrics, run_deepspeed, run_python

STEPS = [
    "--config=configs/quickstart.yaml",
    "--stages.unified.steps=4",
    "--stages.unified.prompts_per_step=4",
    "--stages.unified.group_size=2",
    "--stages.t2i.steps=1",
    "--stages.t2i.prompts_per_step=2",
    "--stages.mc.steps=1",
    "--stages.mc.prompts_per_step=2",
    "--stages.oe.steps=1",
    "--stages.oe.prompts_per_step=2",
    "--evaluation.num_prompts=2",
    "--packing.tokens=600",
    "--logging.samples_every=0",
    "--logging.tensorboard=false",
    "--checkpoint.every=0",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run_python(*STEPS, f"--output_dir={folder}")
    return read_metrics(folder / "quickstart")


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "ranks"), [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_losses_equal_those_of_one_plain_process(tmp_path, plain, zero_stage, ranks):
    run_deepspeed(*STEPS, f"--output_dir={tmp_path}", f"--deepspeed.zero_stage={zero_stage}", ranks=ranks)
    lines = read_metrics(tmp_path / "quickstart")
    assert len(lines) == len(plain) == 7
    for expected, got in zip(plain, lines, strict=True):
        assert got["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=1e-5)
        assert got["metrics"]["grad_norm"] == pytest.approx(expected["metrics"]["grad_norm"], rel=1e-3)
        assert got["rewards"] == pytest.approx(expected["rewards"], abs=1e-5)
        assert got["tokens"] == expected["tokens"]


SMALL = """
name: quickstart
data: {max_prompt_tokens: 256}
model: {lora: {rank: 4}}
rollout: {guidance: 1, max_new_tokens: 16}
algorithm:
  group_size: 2
  external: true
  advantage_mode: normalize_then_sum
  num_iterations: 2
  eps_low: 0.2
  eps_high: 0.2
rewards: {tim: frozen}
evaluation: {num_prompts: 2, scorer: null}
logging: {tensorboard: false, samples_every: 0}
checkpoint: {every: 0}
stages:
  unified: {task: unified, steps: 2, prompts_per_step: 2, beta: 0.1}
"""


@pytest.mark.slow
def test_options_are_the_same_on_two_ranks_that_share_everything(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    run_python(f"--config={config}", f"--output_dir={tmp_path / 'plain'}")
    run_deepspeed(f"--config={config}", f"--output_dir={tmp_path / 'two'}", "--deepspeed.zero_stage=3", ranks=2)
    plain, two = (read_metrics(tmp_path / name / "quickstart") for name in ("plain", "two"))
    assert len(plain) == len(two) == 2
    for expected, got in zip(plain, two, strict=True):
        assert got["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=1e-3, abs=1e-4)
        assert got["metrics"]["grad_norm"] == pytest.approx(expected["metrics"]["grad_norm"], rel=2e-3)
        assert got["rewards"] == pytest.approx(expected["rewards"], abs=1e-4)
