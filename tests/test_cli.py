"""The `fastcorl` command, in process."""

import json
import re
import shutil

import pytest
from PIL import Image

from fastcorl.cli import main
from fastcorl.quickstart.scenes import make_scene


def test_generate_writes_a_grid_that_a_seed_repeats(tmp_path, capsys):
    arguments = ["generate", "--prompt", "a red three at top left", "--num", "3", "--seed", "5"]
    for name in ("first.png", "second.png"):
        main([*arguments, "--grid", str(tmp_path / name), "--out", str(tmp_path / "each")])
    first, second = (Image.open(tmp_path / name) for name in ("first.png", "second.png"))
    assert first.size == (3 * 128, 128)
    assert first.tobytes() == second.tobytes()
    printed = capsys.readouterr()
    assert "first.png" in printed.out
    assert re.search(r"drawing: 192 tokens in [0-9.]+ s, [0-9]+ tokens/s", printed.err)
    each = [Image.open(tmp_path / "each" / f"00{index}.png") for index in range(3)]
    assert [one.tobytes() for one in each] == [first.crop((128 * i, 0, 128 * (i + 1), 128)).tobytes() for i in range(3)]


def test_rows_at_once_and_guidance_are_settings_of_sampling_alone(tmp_path):
    arguments = ["generate", "--prompt", "a red three at top left", "--num", "3", "--guidance", "3", "--top-k", "50"]
    for name, rows in (("first.png", "100"), ("second.png", "3")):
        main([*arguments, "--grid", str(tmp_path / name), "--max-rows", rows])
    first, second = (Image.open(tmp_path / name) for name in ("first.png", "second.png"))
    assert first.tobytes() == second.tobytes()


def test_ask_answers_about_a_picture(tmp_path, capsys):
    Image.fromarray(make_scene(1, 1, "train").image).save(tmp_path / "scene.png")
    main(["ask", "--image", str(tmp_path / "scene.png"), "--question", "how many digits are there?", "--num", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_evaluate_prints_and_writes_scores(tmp_path, capsys):
    main(["evaluate", "--num-prompts", "8", "--out", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())["models"][0]["scores"]
    assert {"overall", "digit", "accuracy", "mc", "oe", "format"} <= set(scores)
    assert "overall" in capsys.readouterr().out


def test_evaluate_puts_models_side_by_side(tmp_path, capsys):
    from fastcorl.model.loading import QUICKSTART_WEIGHTS

    models = ["quickstart", str(QUICKSTART_WEIGHTS / "janus")]
    arguments = ["--num-prompts", "4", "--scorer", "None", "--temperature", "0"]
    main(["evaluate", "--model", *models, *arguments, "--out", str(tmp_path / "both.json")])
    first, second = json.loads((tmp_path / "both.json").read_text())["models"]
    assert [first["model"], second["model"]] == models and first["scores"] == second["scores"]
    assert "accuracy" in (tmp_path / "both.md").read_text() and "accuracy" in capsys.readouterr().out


def test_merge_of_a_model_with_itself_is_that_model(tmp_path):
    from safetensors.torch import load_file

    from fastcorl.model.loading import QUICKSTART_WEIGHTS

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(QUICKSTART_WEIGHTS / "janus", base)
    (base / "README.md").write_text("what the base scored")
    main(["merge", "--base", str(base), "--models", "quickstart", "quickstart", "--out", str(out)])
    before = load_file(QUICKSTART_WEIGHTS / "janus" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name].float() == after[name]).all() for name in before)
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "what the base scored" not in card


def write_run(folder) -> str:
    fields = {"stage": "unified", "step": 1, "total_steps": 1, "rewards": {"total": 1.0}, "metrics": {}, "scores": {}}
    folder.mkdir(parents=True)
    line = json.dumps(fields | {"seconds": {"rollout": 1.0}, "tokens": 8, "images": 1, "memory_gib": 1.0})
    (folder / "metrics.jsonl").write_text(line + "\n")
    return str(folder)


def test_report_is_written_into_the_run(tmp_path, capsys):
    main(["report", write_run(tmp_path / "one")])
    assert "report.html" in capsys.readouterr().out
    assert "one" in (tmp_path / "one" / "report.html").read_text()
    assert Image.open(tmp_path / "one" / "report.png").format == "PNG"


def test_report_compares_runs_of_one_name(tmp_path):
    runs = [write_run(tmp_path / parent / "same") for parent in ("a", "b")]
    main(["report", *runs, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(run in page for run in runs)
    assert (tmp_path / "out" / "report.png").exists()
    with pytest.raises(SystemExit):
        main(["report", runs[0], runs[0], "--out", str(tmp_path / "out")])
