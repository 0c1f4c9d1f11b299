"""Bad rows up to a limit, and their list."""

import json

import pytest

from fastcorl.data import BadRow, Quarantine
from fastcorl.errors import UserError


def bad(row, reason="is empty"):
    return BadRow("data.train x", str(row), "prompt", reason)


def test_too_many_before_the_run():
    Quarantine(0.01).record([bad(1)], 100)
    with pytest.raises(UserError) as error:
        Quarantine(0.01).record([bad(7), bad(8)], 100)
    assert str(error.value) == (
        "data.train x: row 7: prompt: is empty (2 of 100 rows are bad, more than data.max_bad_fraction 0.01; "
        "mend them, or allow more)"
    )


def test_none_allowed():
    Quarantine(0).record([], 100)
    with pytest.raises(UserError, match="1 of 1000000 rows"):
        Quarantine(0).record([bad(1)], 1_000_000)
    met = Quarantine(0)
    met.see("0", None)
    with pytest.raises(UserError, match="row 1: prompt: is empty .1 of 2 rows"):
        met.see("1", bad(1))


def test_verdict_on_rows_that_are_met_waits_for_fifty():
    met = Quarantine(0.05)
    for index in range(48):
        met.see(str(index), bad(index) if index < 3 else None)
    met.see("2", bad(2))  # the same row again is no further one
    met.see("48", None)
    with pytest.raises(UserError, match="row 0: prompt: is empty .3 of 50 rows are bad"):
        met.see("49", None)


def test_one_bad_row_that_is_met_never_suffices():
    met = Quarantine(0.01)
    for index in range(60):
        met.see(str(index), bad(index) if index == 55 else None)
    with pytest.raises(UserError, match="2 of 61"):
        met.see("60", bad(60))


def test_rows_met_again_are_judged_with_all_that_were_looked_at():
    known = Quarantine(0.01)
    known.record([bad(1), bad(2)], 1000)
    for index in range(3, 90):
        known.see(str(index), bad(index) if index < 11 else None)
    with pytest.raises(UserError, match="11 of 1000"):
        known.see("90", bad(90))


def test_list_of_bad_rows(tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    first = Quarantine(1)
    first.record([bad(3)], 10)
    assert not path.exists()
    first.write_to(path)
    first.see("5", bad(5, "has \u2028 'quotes'\nand lines"))
    first.see("5", bad(5))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"source": "data.train x", "row": "3", "column": "prompt", "reason": "is empty"},
        {"source": "data.train x", "row": "5", "column": "prompt", "reason": "has \u2028 'quotes'\nand lines"},
    ]
    with path.open("a") as file:
        file.write('{"source": "data.tr')  # killed while it wrote
    resumed = Quarantine(1)
    resumed.write_to(path)
    resumed.see("5", bad(5))
    resumed.see("6", bad(6))
    lines = path.read_text().splitlines()
    assert lines.pop(2) == '{"source": "data.tr'
    assert [json.loads(line)["row"] for line in lines] == ["3", "5", "6"]


def test_rows_met_during_a_run_are_not_those_it_leaves_out():
    """Else a resumed run, which has not met them, would draw from other rows."""
    quarantine = Quarantine(1)
    quarantine.record([bad(1)], 9)
    quarantine.see("2", bad(2))
    assert quarantine.left_out == {"1"}
    assert list(quarantine.bad) == ["1", "2"]
