"""The command that makes the shipped weights, shortened, and the weights themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcorl.model import load_policy
from fastcorl.quickstart.scenes import make_scene
from fastcorl.records import Prompt
from fastcorl.rewards import BlipCaptioner
from fastcorl.rollout import RolloutEngine, SamplingParams

REPOSITORY = Path(__file__).parents[2]
WEIGHTS = REPOSITORY / "fastcorl" / "quickstart" / "weights"


def sample_once(model):
    from PIL import Image

    policy = load_policy(model)
    scene = make_scene(1, 1, "train")
    prompt = Prompt("0", scene.caption, Image.fromarray(scene.image), scene.question.problem, "", "OE")
    return RolloutEngine(policy).generate([prompt], 2, SamplingParams(max_new_tokens=8))


@pytest.mark.slow
def test_shortened_command_makes_loadable_weights(tmp_path):
    command = [sys.executable, "-m", "fastcorl.quickstart.warm_start", "--output", str(tmp_path), "--scale", "0.001"]
    environment = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, timeout=300)
    rollout = sample_once(tmp_path / "janus")
    assert rollout.images.pixels.shape == (2, 3, 32, 32)
    assert len(rollout.texts.answers) == 2
    captioner = BlipCaptioner.from_pretrained(tmp_path / "captioner")
    assert len(captioner(rollout.images.pixels)) == 2


def test_shipped_weights_are_small_safetensors():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 9e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}


def test_shipped_weights_are_the_documented_architecture():
    rollout = sample_once("quickstart")
    assert rollout.images.tokens.shape == (2, 64)
    assert torch.isfinite(rollout.images.log_probs).all()


def test_shipped_captioner_reads_scenes():
    from fastcorl.quickstart.grammar import parse_caption

    scenes = [make_scene(21, index, "held_out") for index in range(64)]
    pixels = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes]) / 255
    captions = BlipCaptioner.from_pretrained("quickstart")(pixels)
    right = sum(parse_caption(text) == scene.items for text, scene in zip(captions, scenes, strict=True))
    assert right > 0.7 * len(scenes)
