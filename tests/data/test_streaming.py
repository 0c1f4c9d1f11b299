"""Streamed prompts are a function of seed, stage and step: nothing that was asked before changes them."""

from collections import Counter

import pytest

from fastcorl.data import Quarantine, StreamPrompts, hold_out_of_stream, open_stream
from fastcorl.data import validation as validation_module
from fastcorl.data.rows import RowStream
from fastcorl.data.streaming import shuffled
from fastcorl.errors import UserError
from tests.data.examples import in_memory, list_stream, numbered, row, write_hub_layout, write_jsonl


def stream_of(*shards) -> RowStream:
    return RowStream(list_stream(*shards), in_memory(shards[0]).schema)


def source(stream, prompts_per_step=4, **options):
    options = {"seed": 0, "stage": "s", "shuffle_buffer": 5, "quarantine": Quarantine(0.5), **options}
    return StreamPrompts(stream, prompts_per_step=prompts_per_step, **options)


def ids(taken):
    return [prompt.id for prompt in taken]


def test_a_resumed_run_takes_the_same_prompts(tmp_path):
    """On files as on the hub; over several epochs; in whatever order steps are asked for."""
    folder = write_hub_layout(tmp_path / "set", [numbered(7), numbered(9, 7), numbered(5, 16)])
    stream = open_stream(str(folder))
    straight = source(stream)
    steps = [ids(straight.take(step, 0, 1)) for step in range(1, 23)]
    extra = ids(straight.reserve(22, 2, 3, 0, 1))
    for first in (2, 6, 13, 22):
        resumed = source(open_stream(str(folder)))
        assert [ids(resumed.take(step, 0, 1)) for step in range(first, 23)] == steps[first - 1 :]
        assert ids(resumed.reserve(22, 2, 3, 0, 1)) == extra
    wild = source(stream)
    for step in (9, 3, 22, 1, 2, 17, 17, 16):
        assert ids(wild.take(step, 0, 1)) == steps[step - 1]
    assert wild.size == 21


def test_nothing_is_decoded_while_skipping(monkeypatch):
    decoded = []
    real = validation_module.decode_image
    monkeypatch.setattr(validation_module, "decode_image", lambda *a, **k: decoded.append(1) or real(*a, **k))
    source(stream_of(numbered(100))).take(20, 0, 1)
    assert len(decoded) == 4


def test_every_epoch_has_every_row_once_in_another_order():
    prompts = source(stream_of(numbered(8), numbered(4, 8), numbered(12, 12)))
    flat = [each for step in range(1, 31) for each in ids(prompts.take(step, 0, 1))]
    epochs = [flat[start : start + 24] for start in range(0, 120, 24)]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert len({epoch[0].partition("/")[0] for epoch in epochs}) > 1  # the shards' order changes too


@pytest.mark.parametrize("options", [{"seed": 1}, {"stage": "t"}, {"shuffle_buffer": 6}])
def test_seed_stage_and_buffer_change_the_order(options):
    stream = stream_of(numbered(40))
    assert ids(source(stream).take(2, 0, 1)) != ids(source(stream, **options).take(2, 0, 1))


def test_order_never_changes():
    """A run resumed with a later version meets the same prompts."""
    assert [row_id for row_id, _ in shuffled(((str(i), {}) for i in range(12)), 4, "0/s/0/")] == [
        "0",
        "3",
        "4",
        "2",
        "6",
        "7",
        "1",
        "8",
        "5",
        "11",
        "10",
        "9",
    ]


def test_buffer_mixes_a_sorted_stream():
    """The paper's data begins with open-ended questions only."""
    rows = [row(prompt=str(i), qa_type="OE" if i < 500 else "MC") for i in range(1000)]
    kinds = [prompt.question_type for prompt in source(stream_of(rows), 100, shuffle_buffer=700).take(1, 0, 1)]
    assert 10 < kinds.count("MC") < 90


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step(world):
    stream = stream_of(numbered(30))
    whole = source(stream)
    parts = [source(stream) for _ in range(world)]
    for step in (1, 2, 5):
        expected = ids(whole.take(step, 0, 1))
        found = [ids(part.take(step, rank, world)) for rank, part in enumerate(parts)]
        assert [found[place % world][place // world] for place in range(4)] == expected
        more = [each for rank, part in enumerate(parts) for each in ids(part.reserve(step, 1, 1, rank, world))]
        assert len(set(more)) == world


def test_types():
    prompts = source(stream_of(numbered(30)), types=("MC",))
    taken = [prompt for step in range(1, 8) for prompt in prompts.take(step, 0, 1)]
    assert {prompt.question_type for prompt in taken} == {"MC"}
    assert prompts.size == 15
    with pytest.raises(UserError, match="no row has a question of type MC"):
        source(stream_of([row()] * 9), types=("MC",)).take(1, 0, 1)


def test_more_prompts_than_rows():
    with pytest.raises(UserError, match="stages.s.prompts_per_step 4 exceeds the 3 prompts"):
        source(stream_of(numbered(3))).take(1, 0, 1)
    with pytest.raises(UserError, match="does not divide by 3 ranks"):
        source(stream_of(numbered(9))).check(3)


def test_reserve_has_another_order_and_overlaps_no_round_of_its_step():
    prompts = source(stream_of(numbered(400)), shuffle_buffer=100)
    given = [ids(prompts.reserve(3, round, 4, 0, 1)) for round in (1, 2, 3)]
    assert len({each for part in given for each in part}) == 12
    assert given[0] != ids(prompts.take(3, 0, 1))


def test_fraction_of_bad_rows_is_judged_as_they_come():
    rows = numbered(200)
    for index in range(0, 200, 10):
        rows[index]["prompt"] = ""
    prompts = source(stream_of(rows), quarantine=Quarantine(0.05))
    with pytest.raises(UserError, match=r"prompt: is empty .\d+ of \d+ rows are bad, more than data.max_bad_fraction"):
        for step in range(1, 50):
            prompts.take(step, 0, 1)
    assert 10 <= step <= 25
    few = source(stream_of(rows), quarantine=Quarantine(0.2))
    assert all(prompt.caption for step in range(1, 50) for prompt in few.take(step, 0, 1))
    assert len(few.quarantine.bad) == 20


def test_held_out_rows_are_never_trained_on():
    stream = stream_of(numbered(25), numbered(5, 25))
    held, held_ids = hold_out_of_stream(stream, 6, 10, Quarantine(0.5))
    assert set(ids(held)) == held_ids
    assert len(held) == 6
    prompts = source(stream, exclude=held_ids)
    taken = {each for step in range(1, 7) for each in ids(prompts.take(step, 0, 1))}
    assert len(taken) == 24
    assert not taken & held_ids
    with pytest.raises(UserError, match="data.held_out_rows 31 leaves no row"):
        hold_out_of_stream(stream, 31, 10, Quarantine(0.5))


def test_rows_are_read_once_while_steps_go_on(tmp_path, monkeypatch):
    """Going forward reads on; the window of a step is kept, so its replacements cost nothing more."""
    write_jsonl(tmp_path / "x.jsonl", numbered(60))
    stream = open_stream(str(tmp_path / "x.jsonl"))
    read = []
    real = RowStream.numbered
    monkeypatch.setattr(RowStream, "numbered", lambda *a: (read.append(1) or each for each in real(*a)))
    prompts = source(stream)
    for step in range(1, 11):
        prompts.take(step, 0, 1)
        prompts.take(step, 1, 2)
    assert len(read) == 40 + 5
