"""Every kind of bad row is found and left out, wherever it stands: in parquet, in jsonl, in the middle of a stream."""

import pytest

from fastcorl.data import (
    MapPrompts,
    Quarantine,
    StreamPrompts,
    check_rows,
    load_rows,
    open_stream,
)
from tests.data.bad_rows import ANYWHERE, JSONL_ONLY, lengths, make_folder
from tests.data.examples import in_memory, numbered, row, write_jsonl, write_parquet

KINDS = ANYWHERE | JSONL_ONLY
BAD = 4


def rows_around(changes):
    bad = changes if isinstance(changes, str) else {**row(prompt="bad"), **changes}
    return [*numbered(BAD), bad, *numbered(BAD, BAD)]


@pytest.mark.parametrize("kind", ANYWHERE)
def test_in_parquet(kind, tmp_path):
    changes, column, words = KINDS[kind]
    make_folder(tmp_path / "data")
    path = write_parquet(tmp_path / "data" / "x.parquet", rows_around(changes))
    assert_found(load_rows(str(path)), column, words)


@pytest.mark.parametrize("kind", KINDS)
def test_in_jsonl(kind, tmp_path):
    changes, column, words = KINDS[kind]
    make_folder(tmp_path / "data")
    assert_found(load_rows(str(write_jsonl(tmp_path / "data" / "x.jsonl", rows_around(changes)))), column, words)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_middle_of_a_stream(kind, tmp_path):
    changes, column, words = KINDS[kind]
    make_folder(tmp_path / "data")
    write, name = (write_parquet, "x.parquet") if kind in ANYWHERE else (write_jsonl, "x.jsonl")
    quarantine = Quarantine(0.2)
    source = StreamPrompts(
        open_stream(str(write(tmp_path / "data" / name, rows_around(changes)))),
        seed=0,
        stage="s",
        prompts_per_step=3,
        shuffle_buffer=4,
        quarantine=quarantine,
        check_prompt=lengths(),
    )
    taken = [prompt for step in (1, 2, 3) for prompt in source.take(step, 0, 1)]
    assert len(taken) == 9
    assert {prompt.caption for prompt in taken} == {f"caption {i}" for i in range(2 * BAD)}
    (bad,) = quarantine.bad.values()
    assert (bad.row, bad.column) == (str(BAD), column)
    assert words in bad.reason


def assert_found(rows, column, words):
    """Looked at before a run, or met when it is taken, the bad row is reported and never given out."""
    (bad,) = check_rows(rows, check_prompt=lengths(), threads=2)
    assert (bad.row, bad.column) == (str(BAD), column)
    assert words in bad.reason
    assert check_rows(rows, [i for i in range(len(rows)) if i != BAD], lengths()) == []
    met = Quarantine(0.2)
    options = {"seed": 0, "stage": "s", "prompts_per_step": 3, "check_prompt": lengths()}
    source = MapPrompts(rows, quarantine=met, **options)
    taken = [prompt for step in (1, 2, 3) for prompt in source.take(step, 0, 1)]
    assert len(taken) == 9
    assert all(prompt.id != str(BAD) for prompt in taken)
    assert list(met.bad.values()) == [bad]
    looked = Quarantine(0.2)
    looked.record([bad], len(rows))
    source = MapPrompts(rows, quarantine=looked, exclude=looked.bad, **options)
    taken = [prompt.id for step in (1, 2) for prompt in source.take(step, 0, 1)]
    assert len(set(taken)) == 6
    assert str(BAD) not in taken


def test_there_are_enough_kinds():
    assert len(ANYWHERE) >= 40


def test_text_in_parquet_that_is_not_unicode(tmp_path):
    """`datasets` gives no row of such a batch; the others are still read."""
    import pyarrow
    from pyarrow import parquet

    rows = numbered(9)
    columns = {name: pyarrow.array([each[name] for each in rows]) for name in rows[0]}
    broken = pyarrow.array([b"\xff\xfe" if i == BAD else b"fine" for i in range(9)]).cast(pyarrow.binary())
    columns["prompt"] = pyarrow.Array.from_buffers(pyarrow.string(), 9, broken.buffers())
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    rows = load_rows(str(tmp_path / "x.parquet"))
    (bad,) = check_rows(rows)
    assert (bad.row, bad.column) == (str(BAD), "row")
    assert "is not valid Unicode" in bad.reason
    assert rows.column("prompt")[BAD - 1 : BAD + 2] == ["fine", None, "fine"]
    streamed = [found for _, found in open_stream(str(tmp_path / "x.parquet")).numbered()]
    assert [isinstance(found, dict) for found in streamed] == [i != BAD for i in range(9)]


def test_bytes_in_jsonl_that_are_not_unicode(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", rows_around({}))
    lines = path.read_bytes().split(b"\n")
    lines[BAD] = lines[BAD].replace(b"bad", b"\xff\xfe")
    path.write_bytes(b"\n".join(lines))
    (bad,) = check_rows(load_rows(str(path)))
    assert (bad.row, bad.column) == (str(BAD), "row")


def test_indices_limit_the_work():
    rows = in_memory([row(), row(prompt=""), row(qa_type="x")])
    assert [str(bad) for bad in check_rows(rows, range(0, 2))] == ["data.train x:y: row 1: prompt: is empty"]
    assert check_rows(rows, [0]) == []


def test_their_name_of_the_column_is_reported(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{**row(), "text": ""}])
    (bad,) = check_rows(load_rows(str(path), {"prompt": "text"}))
    assert str(bad).endswith("x.parquet: row 0: text: is empty")


def test_a_check_of_the_callers():
    """Reported with whatever it names."""
    rows = in_memory(numbered(3))
    found = check_rows(rows, check_prompt=lambda prompt: ("rewards.x", "no") if prompt.id == "1" else None)
    assert [(bad.row, bad.column, bad.reason) for bad in found] == [("1", "rewards.x", "no")]
