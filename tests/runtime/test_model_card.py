"""Model cards: what they say, what they keep to themselves, and when a run writes them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from fastcorl.config import Config
from fastcorl.config_loading import load_config
from fastcorl.pipeline import Run, train
from fastcorl.runtime.card_parts import CARD
from fastcorl.runtime.model_card import conversion_card, merge_card, stage_card
from fastcorl.tasks import expand
from tests.loop.launching import SMALL_RUN

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "presets" and file.stem != "base")
TAGS = ["fastcorl", "corl", "grpo", "janus"]
COMMON = {"library_name": "transformers", "pipeline_tag": "any-to-any", "tags": TAGS}
STAGES = {
    "unified": {"task": "unified", "steps": 160, "prompts_per_step": 8},
    "t2i": {"task": "t2i", "init": "unified", "beta": 0.02, "data": "mm-vl/x2x_rft_16k:train"},
    "mc": {"task": "mc", "init": "unified", "group_size": 16},
    "oe": {"task": "oe", "init": "unified"},
    "merge": {"task": "merge", "init": "unified", "merge": ["mc", "oe"]},
}
SCORES = [
    {"stage": stage, "scores": {"overall": 0.1 * place, "accuracy": 0.2}}
    for place, stage in enumerate(["start", "unified 80", "unified", "t2i", "mc", "oe", "merge"])
]


def card(stage, *, scores=SCORES, **sections):
    config = Config(**{"name": "digits", "stages": STAGES} | sections)
    return stage_card(config, expand(config), stage, scores, 256)


def front_matter(text, folder):
    """As the hub's own library reads it from a folder."""
    (folder / CARD).write_text(text, encoding="utf-8")
    return ModelCard.load(folder / CARD).data.to_dict()


def score_header(text):
    return next(line for line in text.splitlines() if line.startswith("| score |"))


def test_front_matter_has_the_names_of_the_hub(tmp_path):
    text = card("t2i", model={"path": "deepseek-community/Janus-Pro-1B"}, data={"train": "mm-vl/x2x_rft_22k"})
    names = {"base_model": "deepseek-community/Janus-Pro-1B", "datasets": ["mm-vl/x2x_rft_22k", "mm-vl/x2x_rft_16k"]}
    assert front_matter(text, tmp_path) == names | COMMON


def test_what_is_not_on_the_hub_is_not_in_the_front_matter(tmp_path):
    assert front_matter(card("unified"), tmp_path) == COMMON


def test_nothing_of_the_machine_is_told():
    home = "/home/alice/secret"
    stages = {
        "mc": {"task": "mc", "init": f"{home}/runs/first/export/unified", "data": f"{home}/rows:train"},
        "oe": {"task": "oe", "init": "~alice/secret/start"},
        "merge": {"task": "merge", "merge": [f"{home}/one", "../alice/secret/two"]},
    }
    sections = {
        "model": {"path": f"{home}/janus"},
        "output_dir": f"{home}/runs",
        "resume": f"{home}/runs/digits/checkpoints/step-5",
        "data": {"train": f"{home}/rows/*.parquet", "held_out": "C:\\Users\\alice\\secret\\held.jsonl"},
        "rewards": {
            "captioner": f"{home}/blip",
            "image_similarity": "lpips_vgg",
            "lpips_trunk": f"{home}/vgg.pth",
            "lpips_heads": f"{home}/heads.pth",
            "caption_similarity": ["spice", "bertscore"],
            "spice_folder": f"{home}/spice",
            "bert": f"{home}/bert",
            "clip": "secret/of/alice/clip",
        },
    }
    for stage in stages:
        text = card(stage, stages=stages, **sections)
        assert not re.search("alice|secret|/home|Users", text)
        for name in ("janus", "*.parquet", "held.jsonl", "first/export/unified", "rows:train", "two", "vgg.pth"):
            assert name in text


def test_the_resolved_configuration_is_whole():
    templates = {"MC": "{question}\n<think> a/b </think>", "OE": "/think {question}"}
    text = card("mc", data={"templates": templates, "train": "mm-vl/x2x_rft_22k"})
    found = yaml.safe_load(re.search(r"~~~yaml\n(.*?)\n~~~", text, re.DOTALL)[1])
    config = Config(name="digits", stages=STAGES, data={"templates": templates, "train": "mm-vl/x2x_rft_22k"})
    assert found == {key: value for key, value in config.dump().items() if key not in ("output_dir", "resume")}
    assert Config(**found) == config
    assert r'"a question\n<think> a/b </think>"' in text  # as it was asked in training


@pytest.mark.parametrize(
    ("stage", "columns"),
    [
        ("unified", "start | unified"),
        ("t2i", "start | unified | t2i"),
        ("mc", "start | unified | mc"),
        ("merge", "start | unified | mc | oe | merge"),
    ],
)
def test_scores_are_those_of_the_stages_it_comes_from(stage, columns):
    shown = [entry for entry in reversed(SCORES)]
    text = card(stage, scores=shown)
    assert score_header(text) == f"| score | {columns} | change |"
    assert "256 prompts" in text and "3.1 points" in text


def test_without_scores_of_its_own_a_stage_shows_none():
    text = card("unified", scores=SCORES[:2])
    assert "| score |" not in text and "not been evaluated" in text


def test_how_it_was_made():
    text = card("merge", rewards={"extra": {"mine:short": 0.5}, "weights": {"tim": 0.0}}, algorithm={"beta": 0.01})
    assert "| `unified` | unified | the model shipped with fastcorl | 160 | 8 x 8 | 4e-06 | 0.01 |" in text
    assert "| `mc` | mc | stage `unified` | 100 | 16 x 16 |" in text
    assert "| `merge` | gaussian merge of stage `mc` and stage `oe` | stage `unified` | – |" in text
    assert "- `unified`: cycle 1, accuracy 0.8, format 0.8, mine:short 0.5\n" in text
    assert "- `mc`: accuracy 1, format 1, mine:short 0.5\n" in text
    assert "`t2i`" not in text


def test_a_run_from_an_export_names_what_that_came_from(tmp_path):
    export = tmp_path / "first" / "export" / "unified"
    export.mkdir(parents=True)
    (export / CARD).write_text(
        card("unified", model={"path": "owner/janus"}, data={"train": "owner/captions"}), encoding="utf-8"
    )
    text = card("t2i", model={"path": str(export)}, data={"train": "owner/more"}, stages={"t2i": {"task": "t2i"}})
    names = {"base_model": "owner/janus", "datasets": ["owner/captions", "owner/more"]}
    assert front_matter(text, tmp_path) == names | COMMON
    assert "first/export/unified" in text
    for other in ("no card of ours", "---\nbase_model: a/b\n---\n", "---\n: [\n---\n"):
        (export / CARD).write_text(other)
        assert "base_model" not in front_matter(card("unified", model={"path": str(export)}), tmp_path)


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_configuration_has_cards(file, tmp_path):
    config = load_config(["--config", str(file)])
    stages = expand(config)
    for stage in stages:
        text = stage_card(config, stages, stage, [{"stage": stage, "scores": {"accuracy": 0.5}}], 8)
        assert front_matter(text, tmp_path)["library_name"] == "transformers"
        assert score_header(text) == f"| score | {stage} |"


def test_a_merge_has_a_card_of_its_own(tmp_path):
    for name, base in (("one", "owner/janus"), ("two", "owner/janus")):
        (tmp_path / name).mkdir()
        (tmp_path / name / CARD).write_text(card("unified", model={"path": base}), encoding="utf-8")
    text = merge_card("owner/base", [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "merged", "ties", 0.2)
    assert front_matter(text, tmp_path) == {
        **COMMON,
        "base_model": ["owner/base", "owner/janus"],
        "tags": [*TAGS, "merge"],
    }
    assert "# merged\n" in text and "ties" in text and "0.2" in text and str(tmp_path) not in text


def test_a_conversion_keeps_a_card_of_ours_and_no_other(tmp_path):
    (tmp_path / CARD).write_text("# Somebody's model\n")
    fresh = conversion_card("owner/original", tmp_path, "bfloat16")
    assert "Somebody" not in fresh and "bfloat16" in fresh
    stated = {"base_model": "owner/original", "library_name": "transformers", "pipeline_tag": "any-to-any"}
    assert front_matter(fresh, tmp_path) == stated | {"tags": ["fastcorl", "janus"]}
    ours = card("unified")
    (tmp_path / CARD).write_text(ours, encoding="utf-8")
    kept = conversion_card(str(tmp_path), tmp_path, "bfloat16")
    assert kept.startswith(ours.rstrip()) and kept.rstrip().endswith("weights in bfloat16.")
    assert str(tmp_path) not in kept


SMALL = f"""
extends: {SMALL_RUN}
stages:
  oe: {{task: oe, steps: 2, prompts_per_step: 2}}
"""


class Killed(BaseException):
    pass


def test_a_run_killed_before_its_scores_are_in_the_card_gets_them_there_when_resumed(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL)
    run = tmp_path / "run"
    model_card, scores = run / "export" / "oe" / CARD, run / "scores.json"
    write = Run._write_card

    def go(*options):
        """Train until the run wants to write a second card."""
        left = iter([1])

        def write_one(*arguments):
            if next(left, None) is None:
                raise Killed
            write(*arguments)

        monkeypatch.setattr(Run, "_write_card", write_one)
        train(load_config(["--config", str(tmp_path / "small.yaml"), f"--output_dir={tmp_path}", *options]))

    monkeypatch.setattr(Run, "_report", lambda run: None)  # pictures, which take longer than all of this

    def stages_scored():
        return [entry["stage"] for entry in json.loads(scores.read_text())]

    with pytest.raises(Killed):
        go()
    assert "not been evaluated" in model_card.read_text() and stages_scored() == ["start"]
    go("--resume", "auto")
    text = model_card.read_text()
    assert score_header(text) == "| score | start | oe | change |" and stages_scored() == ["start", "oe"]
    shown = re.search(r"\| accuracy \| ([\d.]+) \| ([\d.]+) \|", text)
    found = [f"{100 * entry['scores']['accuracy']:.1f}" for entry in json.loads(scores.read_text())]
    assert list(shown.groups()) == found
    assert str(tmp_path) not in text
    # Trained again from a checkpoint, it does not keep the scores of before.
    with pytest.raises(Killed):
        go("--resume", str(run / "checkpoints" / "step-1"))
    assert "not been evaluated" in model_card.read_text() and stages_scored() == ["start"]
