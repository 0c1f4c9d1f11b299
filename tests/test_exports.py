"""Drawings in the folders of public scorers, read back the way that each scorer reads them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcorl.benchmark_prompts import read_tasks
from fastcorl.errors import UserError
from fastcorl.exports import export_drawings
from fastcorl.model import load_policy
from fastcorl.records import Prompt
from fastcorl.rollout import RolloutEngine, SamplingParams

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "bird", "count": 3}],
        "exclude": [{"class": "bird", "count": 4}],
        "prompt": "a photo of three birds",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "tie", "count": 1, "position": ["below", 0]}],
        "prompt": "a photo of a tie below a cow",
    },
]
DPG = {"0": "A red three, drawn by hand.", "partiprompts12": "two blue sevens ", "COCOval2014000000010363": "a bench"}
WISE = [
    {"Prompt": "the fruit that fell on Newton", "Explanation": "an apple", "Category": "c", "Subcategory": "s"},
    {"Prompt": "a tree in autumn", "Explanation": "yellow leaves", "Category": "c", "Subcategory": "s"},
]
PARAMS = SamplingParams(temperature=1.0, guidance=5.0)


@pytest.fixture(scope="module")
def engine():
    return RolloutEngine(load_policy("quickstart"), weight_version=0)


@pytest.fixture
def sources(tmp_path):
    """The prompts of each benchmark in its own files."""
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    (tmp_path / "prompts").mkdir()
    for name, prompt in DPG.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(prompt)
    for number, row in enumerate(WISE):
        (tmp_path / f"wise{number}.json").write_text(json.dumps([row | {"prompt_id": 400 + number}]))
    return {
        "geneval": [tmp_path / "evaluation_metadata.jsonl"],
        "dpg": [tmp_path / "prompts"],
        "wise": [tmp_path / "wise0.json", tmp_path / "wise1.json"],
    }


def expected(engine, name, prompt, count, seed=0):
    """(count, H, W, 3) uint8: each sample from an engine call of its own prompt alone."""
    one = Prompt(name, prompt, None, "", "", "OE")
    pixels = engine.generate([one], count, PARAMS, answer=False, seed=seed).images.pixels
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()


def read_geneval(folder):
    """As `evaluation/evaluate_images.py:main` walks the folder: {subfolder: (metadata, {image name: pixels})}."""
    found = {}
    for subfolder in os.listdir(folder):
        path = os.path.join(folder, subfolder)
        if not os.path.isdir(path) or not subfolder.isdigit():
            continue
        with open(os.path.join(path, "metadata.jsonl")) as file:
            metadata = json.load(file)
        images = {}
        for name in os.listdir(os.path.join(path, "samples")):
            image = os.path.join(path, "samples", name)
            if os.path.isfile(image) and re.match(r"\d+\.png", name):
                images[name] = np.asarray(Image.open(image))
        found[subfolder] = (metadata, images)
    return found


def read_dpg(folder, resolution, pic_num):
    """As `dpg_bench/compute_dpg_bench.py` cuts every file of the folder: {item_id: [pixels]}."""
    corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)][:pic_num]
    return {
        name.split(".")[0]: [
            np.asarray(Image.open(os.path.join(folder, name)).crop((x, y, x + resolution, y + resolution)))
            for x, y in corners
        ]
        for name in os.listdir(folder)
    }


def test_geneval(engine, sources, tmp_path):
    told = []
    out = tmp_path / "out"
    exported = export_drawings(engine, "geneval", sources["geneval"], out, PARAMS, progress=lambda *at: told.append(at))
    assert (exported.drawn, exported.kept, exported.side) == (12, 0, 32)
    assert told[-1] == (12, 12) and told == sorted(told)
    found = read_geneval(out)
    assert sorted(found) == ["00000", "00001", "00002"]
    for index, line in enumerate(GENEVAL):
        metadata, images = found[f"{index:05d}"]
        assert metadata == line
        assert sorted(images) == ["0000.png", "0001.png", "0002.png", "0003.png"]
        drawn = np.stack([images[name] for name in sorted(images)])
        assert_close(drawn, expected(engine, f"{index:05d}", line["prompt"], 4))
    assert len({images[name].tobytes() for _, images in found.values() for name in images}) == 12


@pytest.mark.parametrize("samples", [4, 1])
def test_dpg(engine, sources, tmp_path, samples):
    out = tmp_path / "out"
    exported = export_drawings(engine, "dpg", sources["dpg"], out, PARAMS, samples=samples)
    assert (exported.drawn, exported.side) == (3, 32)
    found = read_dpg(out, exported.side, samples)
    assert found.keys() == DPG.keys()
    for name, prompt in DPG.items():
        assert Image.open(out / f"{name}.png").size == ((64, 64) if samples == 4 else (32, 32))
        assert_close(np.stack(found[name]), expected(engine, name, prompt.strip(), samples))


def test_wise(engine, sources, tmp_path):
    out = tmp_path / "out"
    export_drawings(engine, "wise", sources["wise"], out, PARAMS, seed="other")
    for source in sources["wise"]:
        prompts = {item["prompt_id"]: item for item in json.loads(source.read_text())}
        for number, item in prompts.items():
            drawn = np.asarray(Image.open(os.path.join(out, f"{number}.png")))
            assert_close(drawn, expected(engine, str(number), item["Prompt"], 1, seed="other")[0])
    assert sorted(os.listdir(out)) == ["400.png", "401.png"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same(ours, theirs):
    """Folders of the same files; the decoder rounds by the number of drawings it decodes, which may be a grey level."""
    assert contents(ours).keys() == contents(theirs).keys()
    for name in contents(ours):
        if name.suffix != ".png":
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
            continue
        with Image.open(ours / name) as one, Image.open(theirs / name) as other:
            assert one.info == other.info
            assert_close(np.asarray(one), np.asarray(other))


def assert_close(ours, theirs):
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert ours.shape == theirs.shape and difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_an_export_goes_on_where_it_stopped(engine, sources, tmp_path, monkeypatch):
    export_drawings(engine, "geneval", sources["geneval"], tmp_path / "whole", PARAMS)
    out, calls, saved = tmp_path / "out", [], []
    generate, save = RolloutEngine.generate, Image.Image.save

    def counted(self, prompts, *args, **kwargs):
        calls.append([prompt.id for prompt in prompts])
        return generate(self, prompts, *args, **kwargs)

    def stopped(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(args)
        if len(saved) == 6:  # a picture is whole on the disk, but without its name yet
            raise KeyboardInterrupt

    monkeypatch.setattr(RolloutEngine, "generate", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", stopped)
        export_drawings(engine, "geneval", sources["geneval"], out, PARAMS, drawings_at_once=4)
    assert sum(len(images) for _, images in read_geneval(out).values()) == 5
    calls.clear()
    exported = export_drawings(engine, "geneval", sources["geneval"], out, PARAMS, drawings_at_once=8)
    assert (exported.drawn, exported.kept) == (7, 5)
    assert calls == [["00001", "00002"]]
    assert_same(out, tmp_path / "whole")
    calls.clear()
    (out / "00001" / "metadata.jsonl").unlink()
    again = export_drawings(engine, "geneval", sources["geneval"], out, PARAMS)
    assert (again.drawn, again.kept, again.side) == (0, 12, 32) and calls == []
    assert_same(out, tmp_path / "whole")


def test_parts_and_more_samples_make_the_same_pictures(engine, sources, tmp_path):
    export_drawings(engine, "geneval", sources["geneval"], tmp_path / "whole", PARAMS, samples=3)
    for part in ((1, 2), (0, 2)):
        export_drawings(engine, "geneval", sources["geneval"], tmp_path / "parts", PARAMS, samples=2, part=part)
    export_drawings(engine, "geneval", sources["geneval"], tmp_path / "parts", PARAMS, samples=3)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("change", ["seed", "guidance", "prompt", "weights"])
def test_pictures_of_another_export_are_not_kept(engine, sources, tmp_path, change):
    out = tmp_path / "out"
    export_drawings(engine, "dpg", sources["dpg"], out, PARAMS)
    before = contents(out)
    seed, params = int(change == "seed"), PARAMS
    if change == "guidance":
        params = SamplingParams(1.0, 4.0)
    elif change == "prompt":
        (tmp_path / "prompts" / "0.txt").write_text("another prompt")
    elif change == "weights":
        policy = load_policy("quickstart")
        with torch.no_grad():
            policy.backbone.layers[1].mlp.down_proj.weight.add_(1e-3)
        engine = RolloutEngine(policy)
    with pytest.raises(UserError, match=rf"was drawn with {change} .*another --out"):
        export_drawings(engine, "dpg", sources["dpg"], out, params, seed=seed)
    assert contents(out) == before


def test_files_that_are_no_pictures_of_ours_are_refused(engine, sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (64, 64)).save(out / "0.png")
    with pytest.raises(UserError, match="not drawn by an export"):
        export_drawings(engine, "dpg", sources["dpg"], out, PARAMS)
    (out / "0.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match="no whole picture"):
        export_drawings(engine, "dpg", sources["dpg"], out, PARAMS)


@pytest.mark.parametrize(
    ("layout", "name", "content", "message"),
    [
        ("geneval", "m.jsonl", '{"tag": "x", "prompt": "a"}\nno json\n', "line 2: is no JSON"),
        ("geneval", "m.jsonl", '{"tag": "x", "prompt": "a"}\n\n{"tag": "x", "prompt": "b"}', "line 2: is no JSON"),
        ("geneval", "m.jsonl", "[1]", "line 1: must be a JSON object"),
        ("geneval", "m.jsonl", '{"prompt": "a"}', "line 1: tag"),
        ("geneval", "m.jsonl", '{"tag": "x", "prompt": ""}', "line 1: prompt: must be a text"),
        ("geneval", "m.jsonl", '{"tag": "x", "prompt": "\\ud800"}', "half of a surrogate pair"),
        ("geneval", "m.jsonl", '{"tag": "x", "prompt": "%s"}' % ("word " * 600), "line 1: the prompt has .* tokens"),
        ("geneval", "m.jsonl", b"\xff\xfe\xff", "cannot be read as UTF-8"),
        ("dpg", "a.b.txt", "a bench", "first dot"),
        ("dpg", "a.md", "a bench", "ends in .txt"),
        ("dpg", "a.txt", " \n", "must be a text"),
        ("wise", "w.json", "{}", "must be a JSON list"),
        ("wise", "w.json", "[", "is no JSON"),
        ("wise", "w.json", '[{"Prompt": "a"}]', "entry 0: prompt_id"),
        ("wise", "w.json", '[{"Prompt": "a", "prompt_id": "../a"}]', "entry 0: prompt_id"),
        ("wise", "w.json", '[{"prompt": "a", "prompt_id": 3}]', "entry 0: Prompt: must be a text"),
        ("wise", "w.json", '[{"Prompt": "a", "prompt_id": 3}, {"Prompt": "b", "prompt_id": 3}]', "entry 1: .*entry 0"),
        ("wise", "w.json", "[]", "no prompts for wise"),
        ("other", "w.json", "[]", "must be one of geneval, dpg, wise"),
    ],
)
def test_wrong_prompts_are_one_line(engine, tmp_path, layout, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        export_drawings(engine, layout, [tmp_path / name], tmp_path / "out", PARAMS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_one_line(engine, sources, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such file"):
        export_drawings(engine, "dpg", [tmp_path / "nothing"], out, PARAMS)
    with pytest.raises(UserError, match="is a folder"):
        export_drawings(engine, "wise", [tmp_path], out, PARAMS)
    with pytest.raises(UserError, match="GenEval has one file"):
        export_drawings(engine, "geneval", 2 * sources["geneval"], out, PARAMS)
    for layout, samples in (("dpg", 2), ("wise", 4), ("geneval", 0)):
        with pytest.raises(UserError, match="--samples"):
            export_drawings(engine, layout, sources[layout], out, PARAMS, samples=samples)
    with pytest.raises(UserError, match="--part 2/2"):
        export_drawings(engine, "dpg", sources["dpg"], out, PARAMS, part=(2, 2))


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"tag": "x", "prompt": "one\u2028two"}\r\n{"tag": "x", "prompt": "three"}', encoding="utf-8")
    assert [task.prompt for task in read_tasks("geneval", [path])] == ["one\u2028two", "three"]


def test_command(sources, tmp_path, capsys):
    from fastcorl.commands.export_drawings import ExportDrawings

    settings = {"layout": "wise", "prompts": sources["wise"], "device": "cpu"}
    ExportDrawings(out=tmp_path / "whole", **settings).run()
    assert "2 pictures drawn, 0 kept; a sample is 32 x 32 pixels" in capsys.readouterr().out
    for part in ("0/2", "1/2"):
        ExportDrawings(out=tmp_path / "parts", part=part, **settings).run()
    assert_same(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(UserError, match="--part"):
        ExportDrawings(out=tmp_path / "parts", part="2", **settings).run()
