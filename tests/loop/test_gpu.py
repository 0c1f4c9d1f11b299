"""Training on a GPU: what a run there computes is what it computes on a CPU."""

import math

import pytest

from fastcorl.config_loading import load_config
from fastcorl.pipeline import Run, train
from tests.loop.launching import SMALL_RUN, read_metrics, run_python

pytestmark = pytest.mark.gpu

STAGES = f"""
extends: {SMALL_RUN}
algorithm: {{group_size: 4}}
optimizer: {{warmup_steps: 0, learning_rate: 1e-3}}
checkpoint: {{every: 0}}
stages:
  unified: {{task: unified, steps: 2, prompts_per_step: 4}}
  oe: {{task: oe, init: unified, steps: 2, prompts_per_step: 4, beta: 0.1}}
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_report", lambda _: None)  # half of a small run's time
    file = tmp_path / "stages.yaml"
    file.write_text(STAGES)
    return ["--config", str(file)]


def test_a_first_step_is_that_of_a_cpu(stages, tmp_path):
    """The same rows are sampled in float32; later steps drift apart by rounding."""
    train(load_config([*stages, f"--output_dir={tmp_path / 'gpu'}"]))
    run_python(*stages, f"--output_dir={tmp_path / 'cpu'}")
    ours, expected = (read_metrics(tmp_path / device / "run")[0] for device in ("gpu", "cpu"))
    for name, reward in expected["rewards"].items():
        assert ours["rewards"][name] == pytest.approx(reward, abs=2e-3), name
    assert ours["metrics"]["grad_norm"] == pytest.approx(expected["metrics"]["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rollout.overlap=off", "--algorithm.reference=offload", "--model.attention=sdpa"],
        ["--model.lora.rank=4", "--model.gradient_checkpointing=true", "--rollout.guidance=3"],
    ],
    ids=["defaults", "without overlap", "adapters"],
)
def test_runs_in_bfloat16(stages, tmp_path, options):
    train(load_config([*stages, f"--output_dir={tmp_path}", "--model.dtype=bfloat16", *options]))
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 4
    for line in lines:
        metrics = line["metrics"]
        assert all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm"))
        assert metrics["grad_norm"] > 0 and metrics["text_mismatch"] < 0.1
        assert metrics.get("image_mismatch", 0) < 0.1
