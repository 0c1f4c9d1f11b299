"""Rows from every kind of source, and the mistakes each of them allows."""

import csv
import json
import sys

import datasets
import huggingface_hub
import pytest

from fastcorl.data import Needs, PromptData, check_rows, load_rows, open_stream
from fastcorl.data import hub as hub_module
from fastcorl.errors import UserError
from tests.data.examples import captions, numbered, png, row, write_hub_layout, write_jsonl, write_parquet


def module_of_rows(value, monkeypatch, tmp_path):
    """A module in the current folder whose `train` returns `value`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rows.py").write_text("ROWS = None\ndef train():\n    return ROWS\n")
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    import my_rows

    my_rows.ROWS = value
    return "my_rows:train"


def streamed(source, **options):
    stream = open_stream(source, **options)
    return [found for _, found in stream.numbered()]


def assert_rows(source, expected, **options):
    """By index and as a stream the source has these captions, and every row is good."""
    rows = load_rows(source, **options)
    assert check_rows(rows) == []
    assert captions(PromptData(rows)) == expected
    assert rows.column("prompt") == expected
    assert [each["prompt"] for each in streamed(source, **options)] == expected


def test_function(monkeypatch, tmp_path):
    assert_rows(module_of_rows(numbered(3), monkeypatch, tmp_path), ["caption 0", "caption 1", "caption 2"])


def test_function_that_returns_a_stream(monkeypatch, tmp_path):
    table = datasets.Dataset.from_list(numbered(5)).to_iterable_dataset()
    source = module_of_rows(table, monkeypatch, tmp_path)
    assert [each["prompt"] for each in streamed(source)] == [f"caption {i}" for i in range(5)]
    with pytest.raises(UserError, match="no fixed rows; set data.streaming"):
        load_rows(source)


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", numbered(40))
    assert isinstance(datasets.Dataset.from_parquet(str(path)).features["real_image"], datasets.Image)
    assert_rows(str(path), [f"caption {i}" for i in range(40)])


def test_parquet_without_features_of_datasets(tmp_path):
    import pyarrow
    from pyarrow import parquet

    plain = [{**each, "real_image": png()} for each in numbered(2)]
    parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "x.parquet")
    assert_rows(str(tmp_path / "x.parquet"), ["caption 0", "caption 1"])


@pytest.mark.parametrize("source", ["data", "data/*.parquet", "data/**/*.parquet"])
def test_parquet_shards(source, tmp_path):
    for shard in range(3):
        write_parquet(tmp_path / "data" / f"part-{shard}.parquet", numbered(2, 2 * shard))
    assert_rows(str(tmp_path / source), [f"caption {i}" for i in range(6)])
    stream = open_stream(str(tmp_path / source))
    assert [row_id for row_id, _ in stream.numbered()] == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]


def test_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [row(prompt="line\u2028separator"), row(prompt="b")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n")
    assert_rows(str(path), ["line\u2028separator", "b"])
    assert PromptData(load_rows(str(path)))[0].image.size == (8, 6)


def test_jsonl_shards(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", numbered(2))
    write_jsonl(tmp_path / "b.jsonl", numbered(2, 2))
    for source in (tmp_path, tmp_path / "*.jsonl"):
        assert_rows(str(source), [f"caption {i}" for i in range(4)])


def test_json(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "x.json").write_text(json.dumps([row(real_image="a.png"), row(real_image="a.png", prompt="b")]))
    assert_rows(str(tmp_path / "x.json"), ["a red three", "b"])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("place", ["", "train"])
def test_image_folder(kind, place, tmp_path):
    folder = tmp_path / "pictures" / place
    (folder / "sub").mkdir(parents=True)
    rows = []
    for index, each in enumerate(numbered(3)):
        del each["real_image"]
        (folder / "sub" / f"{index}.png").write_bytes(png((4 + index, 5)))
        rows.append({"file_name": f"sub/{index}.png", **each, "pair_similarity": 0.25})
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    source = str(tmp_path / "pictures")
    assert_rows(source, ["caption 0", "caption 1", "caption 2"], split="train")
    prompt = PromptData(load_rows(source, split="train"))[2]
    assert (prompt.image.size, prompt.pair_similarity) == ((6, 5), 0.25)


def test_saved_data_set(tmp_path):
    datasets.Dataset.from_list(numbered(3)).save_to_disk(str(tmp_path / "saved"))
    assert_rows(str(tmp_path / "saved"), ["caption 0", "caption 1", "caption 2"])
    splits = {"train": datasets.Dataset.from_list(numbered(2)), "test": datasets.Dataset.from_list(numbered(1, 9))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert_rows(str(tmp_path / "splits"), ["caption 0", "caption 1"], split="train")
    assert_rows(f"{tmp_path / 'splits'}:test", ["caption 9"], split="train")


def test_folder_laid_out_as_on_the_hub(tmp_path):
    folder = write_hub_layout(tmp_path / "set", [numbered(3), numbered(3, 3)])
    assert_rows(str(folder), [f"caption {i}" for i in range(6)])
    assert captions(PromptData(load_rows(f"{folder}:train[2:4]"))) == ["caption 2", "caption 3"]
    with pytest.raises(UserError, match="Unknown split"):
        load_rows(f"{folder}:test")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(streaming, tmp_path, monkeypatch):
    """All but the download: `load_dataset` is given a local folder in place of the name."""
    folder = write_hub_layout(tmp_path / "set", [numbered(3), numbered(2, 3)], split="validation")
    real, asked = datasets.load_dataset, []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options.pop("revision"), options["split"], options["streaming"]))
        return real(str(folder), subset, **options)

    monkeypatch.setattr(hub_module.datasets, "load_dataset", load_dataset)
    options = {"split": "train", "revision": "abc", "subset": "default"}
    source = "someone/some-set.v1:validation"
    if streaming:
        found = [each["prompt"] for each in streamed(source, **options)]
    else:
        found = captions(PromptData(load_rows(source, **options)))
    assert found == [f"caption {i}" for i in range(5)]
    assert asked == [("someone/some-set.v1", "default", "abc", "validation", streaming)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub cannot be reached"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
            "no such file or folder, and the hub",
        ),
        (ValueError("BuilderConfig 'x' not found. Available: ['y']"), "Available: .'y'."),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer supported"),
        (huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all"), "no network at all"),
    ],
)
def test_hub_errors_are_one_line(error, words, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub_module.datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=f"^data.train a/b: .*{words}") as caught:
        load_rows("a/b")
    assert "\n" not in str(caught.value)


def test_public_data_sets_by_their_aliases(tmp_path):
    """`problem`, `solution` and `image` are found, and the questions' type is known."""
    rows = [{"image": row()["real_image"], "problem": "A or B?", "solution": row()["qa_solution"]}] * 3
    path = write_parquet(tmp_path / "mcot_r1_mcq_66k" / "data.parquet", rows)
    table = load_rows(str(path.parent), needs=Needs(draw=False))
    assert table.column("qa_type") == ["MC"] * 3
    prompt = PromptData(table)[0]
    assert (prompt.question, prompt.question_type, prompt.caption) == ("A or B?", "MC", "")
    with pytest.raises(UserError, match="no column 'prompt' or 'caption' .found: image, problem, solution"):
        load_rows(str(path.parent), needs=Needs(answer=False))
    other = write_parquet(tmp_path / "other" / "data.parquet", rows)
    with pytest.raises(UserError, match="no column 'real_image' .*as in --data.columns real_image image"):
        load_rows(str(other.parent), needs=Needs(draw=False))


def test_needs_decide_the_columns(tmp_path):
    pictures = [{name: each[name] for name in ("prompt", "real_image")} for each in numbered(2)]
    path = str(write_parquet(tmp_path / "x.parquet", pictures))
    prompt = PromptData(load_rows(path, needs=Needs(answer=False)))[1]
    assert (prompt.caption, prompt.question, prompt.solution, prompt.pair_similarity) == ("caption 1", "", "", 1.0)
    with pytest.raises(UserError, match="no column 'qa_problem'"):
        load_rows(path)
    questions = [{name: v for name, v in each.items() if name not in ("prompt", "qa_type")} for each in numbered(2)]
    path = str(write_parquet(tmp_path / "y.parquet", questions))
    with pytest.raises(UserError, match="no column 'qa_type'"):
        load_rows(path, needs=Needs(draw=False))
    table = load_rows(path, needs=Needs(draw=False), question_type="OE")
    assert (PromptData(table)[0].question_type, PromptData(table)[0].caption) == ("OE", "")


def test_what_is_not_needed_may_be_broken():
    from tests.data.examples import in_memory

    table = in_memory([row(qa_problem=7, qa_solution=None, qa_type="what")], Needs(answer=False))
    assert check_rows(table) == []
    assert PromptData(table)[0].question == ""


def test_renamed_columns(tmp_path):
    path = str(write_parquet(tmp_path / "x.parquet", [{"text": "t", **row()}]))
    assert load_rows(path, {"prompt": "text"}).column("prompt") == ["t"]
    with pytest.raises(UserError, match="no column 'absent'"):
        load_rows(path, {"prompt": "absent"})
    with pytest.raises(UserError, match="no column 'absent'"):
        load_rows(path, {"pair_similarity": "absent"})


def test_columns_that_are_not_ours_are_never_read(tmp_path, monkeypatch):
    """A second image column may name any file; `datasets` must not open it."""
    table = datasets.Dataset.from_list([{**row(), "other": {"bytes": None, "path": "/etc/hostname"}}] * 2)
    table = table.cast_column("other", datasets.Image())
    table.to_parquet(str(tmp_path / "x.parquet"))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded by datasets"))
    assert_rows(str(tmp_path / "x.parquet"), ["a red three"] * 2)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("no_such_module_here:train", "cannot import 'no_such_module_here': ModuleNotFoundError"),
        ("json:no_such", "'json' has no 'no_such'"),
        ("json:__name__", "is not a function"),
        ("os:getcwd", "returned a str, not"),
        ("no/such/file.parquet", "no such file or folder"),
        ("such/file.parquet", "no such file or folder"),
        ("https://example.com/x.parquet", "no such file or folder"),
        ("*.none", "no file matches"),
        ("mixed*", "files of several kinds (.jsonl, .parquet)"),
        ("x.csv", "must be .parquet, .jsonl, .json"),
        ("x.parquet", "parquet"),
        ("folder", "not a folder of datasets.save_to_disk"),
        ("splits", "holds the splits train, test"),
        ("bad.jsonl", "line 1 is not valid JSON"),
        ("list.jsonl", "row 0: must be a mapping"),
        ("mapping.json", "must be a list of rows"),
        ("broken.json", "not valid JSON"),
        ("empty.jsonl", "has no rows"),
        ("columns.jsonl", "no column 'prompt' (found: text, image); name yours in data.columns, as in --data.columns "),
    ],
)
def test_mistaken_sources(source, expected, streaming, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    splits = {"train": datasets.Dataset.from_list([{"a": 1}]), "test": datasets.Dataset.from_list([{"a": 1}])}
    datasets.DatasetDict(splits).save_to_disk("splits")
    files = {
        "x.csv": "a\n1\n",
        "x.parquet": "not parquet",
        "mixed.jsonl": "{}",
        "mixed.parquet": "",
        "bad.jsonl": '{"prompt": \n',
        "list.jsonl": "[1]\n",
        "mapping.json": "{}",
        "broken.json": "[",
        "empty.jsonl": "\n",
        "columns.jsonl": '{"text": "a", "image": "b"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        (open_stream if streaming else load_rows)(source)
    assert expected in str(error.value)
    assert str(error.value).startswith("data.train") and source in str(error.value)


def test_stream_that_breaks(tmp_path):
    """A truncated shard: what comes before it can be read, and the error says where it ends."""
    write_parquet(tmp_path / "a.parquet", numbered(4))
    whole = write_parquet(tmp_path / "b.parquet", numbered(4, 4)).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    rows = open_stream(str(tmp_path)).numbered()
    assert [next(rows)[1]["prompt"] for _ in range(4)] == [f"caption {i}" for i in range(4)]
    with pytest.raises(UserError, match="cannot be read beyond row 0"):
        next(rows)
