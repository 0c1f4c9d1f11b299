"""Rows from every kind of source, and the mistakes each of them allows."""

import io
import json

import datasets
import pytest
from PIL import Image

from fastcorl.data import ImageError, PromptData, decode_image, load_rows, validate_rows
from fastcorl.errors import UserError


def png(size=(8, 6), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def row(**changes):
    return {
        "prompt": "a red three",
        "real_image": Image.new("RGB", (8, 6), "red"),
        "qa_problem": "Which digit?",
        "qa_solution": "<answer>3</answer>",
        "qa_type": "OE",
    } | changes


def from_function(rows, monkeypatch, tmp_path, columns=None):
    """`rows` as a data set that a module in the current folder offers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rows.py").write_text("ROWS = []\ndef train():\n    return ROWS\n")
    monkeypatch.delitem(__import__("sys").modules, "my_rows", raising=False)
    import my_rows

    my_rows.ROWS.extend(rows)
    return load_rows("my_rows:train", columns)


def test_function(monkeypatch, tmp_path):
    rows = from_function([row(), row(qa_type="MC")], monkeypatch, tmp_path)
    validate_rows(rows)
    assert rows.column("qa_type") == ["OE", "MC"]
    assert PromptData(rows)[0].image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_datasets_files(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_list([row(), row(prompt="b")]).rename_column("prompt", "text")
    assert isinstance(table.features["real_image"], datasets.Image)
    path = tmp_path / ("x.parquet" if kind == "parquet" else "saved")
    table.to_parquet(str(path)) if kind == "parquet" else table.save_to_disk(str(path))
    rows = load_rows(str(path), {"prompt": "text"})
    validate_rows(rows)
    prompt = PromptData(rows)[1]
    assert (prompt.caption, prompt.image.size, prompt.id) == ("b", (8, 6), "1")
    assert rows.column("prompt") == ["a red three", "b"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_with_images_beside_it(kind, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    rows = [row(real_image="images/a.png", prompt="line\u2028separator"), row(real_image="images/a.png")]
    text = (
        json.dumps(rows, ensure_ascii=False)
        if kind == "json"
        else "\n".join(json.dumps(each, ensure_ascii=False) for each in rows)
    )
    (tmp_path / f"x.{kind}").write_text(text + "\n", encoding="utf-8")
    loaded = load_rows(str(tmp_path / f"x.{kind}"))
    validate_rows(loaded)
    assert len(loaded) == 2
    assert PromptData(loaded)[0].image.size == (8, 6)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("no_such_module_here:train", "cannot import 'no_such_module_here': ModuleNotFoundError"),
        ("json:no_such", "'json' has no 'no_such'"),
        ("json:__name__", "is not a function"),
        ("os:getcwd", "returned a str, not a sequence of rows"),
        ("no/such/file.parquet", "no such file or folder"),
        ("https://example.com/x.parquet", "no such file or folder"),
        ("x.csv", "must be .parquet, .jsonl, .json"),
        ("x.parquet", "not a readable parquet file"),
        ("folder", "not a folder of datasets.save_to_disk"),
        ("splits", "holds the splits train, test"),
        ("bad.jsonl", "line 2: not valid JSON"),
        ("list.jsonl", "row 0: must be a mapping"),
        ("mapping.json", "must be a list of rows"),
        ("empty.jsonl", "has no rows"),
        ("columns.jsonl", "no column 'prompt' (found: text, image); name yours in data.columns, as in --data.columns "),
    ],
)
def test_mistaken_sources(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    splits = {"train": datasets.Dataset.from_list([{"a": 1}]), "test": datasets.Dataset.from_list([{"a": 1}])}
    datasets.DatasetDict(splits).save_to_disk("splits")
    files = {
        "x.csv": "a\n1\n",
        "x.parquet": "not parquet",
        "bad.jsonl": '{"prompt": "a"}\n{"prompt": \n',
        "list.jsonl": "[1]\n",
        "mapping.json": "{}",
        "empty.jsonl": "\n",
        "columns.jsonl": '{"text": "a", "image": "b"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_rows(source)
    assert expected in str(error.value)
    assert str(error.value).startswith("data.train") and source in str(error.value)


def animation():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def gif():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="GIF")
    return buffer.getvalue()


MISTAKES = [
    ({"prompt": ""}, "prompt: is empty"),
    ({"prompt": " \n"}, "prompt: is empty"),
    ({"prompt": None}, "prompt: must be text, got nothing"),
    ({"qa_problem": float("nan")}, "qa_problem: must be text, got a float"),
    ({"qa_problem": "\ud800"}, "qa_problem: is not valid Unicode"),
    ({"qa_solution": "3"}, "qa_solution: has no <answer>...</answer>"),
    ({"qa_solution": "<answer> </answer>"}, "qa_solution: has no <answer>...</answer>"),
    ({"qa_type": "mc"}, "qa_type: must be one of MC, OE, got 'mc'"),
    ({"real_image": None}, "real_image: is no image but missing"),
    ({"real_image": 3}, "real_image: is no image but a int"),
    ({"real_image": "a.png"}, "real_image: is the path 'a.png', but this source has no folder"),
    ({"real_image": b"not an image"}, "real_image: is not one of PNG, JPEG, WEBP"),
    ({"real_image": b""}, "real_image: is not one of PNG, JPEG, WEBP"),
    ({"real_image": gif()}, "real_image: is not one of PNG, JPEG, WEBP"),
    ({"real_image": png((300, 300))[:-40]}, "real_image: does not decode"),
    ({"real_image": animation()}, "real_image: is an animation"),
    ({"real_image": png((8000, 7000), "1")}, "real_image: has 8000x7000 pixels"),
    ({"real_image": png((10000, 9500), "1")}, "real_image: is too large"),
    ({"real_image": {"bytes": None, "path": "/etc/hostname"}}, "real_image: is the path"),
]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES, ids=[expected for _, expected in MISTAKES])
def test_mistaken_rows(changes, expected, monkeypatch, tmp_path):
    rows = from_function([row(), row(**changes)], monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"^data.train my_rows:train: row 1: ") as error:
        validate_rows(rows)
    assert expected in str(error.value)
    validate_rows(rows, indices=[0])


def test_row_that_lacks_a_column(monkeypatch, tmp_path):
    short = row()
    del short["qa_type"]
    rows = from_function([row(), short], monkeypatch, tmp_path)
    with pytest.raises(UserError, match="row 1: no column 'qa_type' .found: prompt, real_image"):
        validate_rows(rows)


def test_renamed_column_is_the_one_in_the_error(monkeypatch, tmp_path):
    renamed = row(text="")
    del renamed["prompt"]
    rows = from_function([renamed], monkeypatch, tmp_path, {"prompt": "text"})
    with pytest.raises(UserError, match="row 0: text: is empty"):
        validate_rows(rows)


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "absent.png", "."])
def test_images_stay_in_the_folder(path, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="data's folder"):
        decode_image(path, folder)
    with pytest.raises(ImageError, match="leads out"):
        decode_image(str(tmp_path / "secret.png"), folder)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_come_out_rgb(mode):
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, format="JPEG" if mode == "CMYK" else "PNG")
    image = decode_image(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_images_come_out_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(png((8, 6), exif=exif)).size == (6, 8)
