"""Prompts of rows by index: order, ranks, reserve, and bad rows met on the way."""

import hashlib

import pytest

from fastcorl.data import MapPrompts, PromptData, PromptSampler, Quarantine, hold_out, load_rows
from fastcorl.data.sampler import reserve_block
from fastcorl.errors import UserError
from tests.data.examples import in_memory, numbered, row


def prompts(types=("MC", "OE", "MC", "OE", "OE")):
    return PromptData(in_memory([row(prompt=f"a three {i}", qa_type=kind) for i, kind in enumerate(types)]))


def source(rows, prompts_per_step=4, **options):
    options = {"seed": 0, "stage": "unified", "quarantine": Quarantine(0.5), **options}
    return MapPrompts(in_memory(rows), prompts_per_step=prompts_per_step, **options)


def ids(taken):
    return [prompt.id for prompt in taken]


def test_prompts():
    data = prompts()
    assert len(data) == 5
    prompt = data[2]
    assert (prompt.id, prompt.caption, prompt.question_type, prompt.image.mode) == ("2", "a three 2", "MC", "RGB")
    assert prompt.pair_similarity == 1.0
    assert ids(data) == ["0", "1", "2", "3", "4"]


def test_only_keeps_ids():
    data = prompts()
    assert ids(data.only({"MC"})) == ["0", "2"]
    assert ids(data.only({"MC", "OE"}).only({"OE"})) == ["1", "3", "4"]
    assert ids(data.without({"1", "4"}).only(["OE"])) == ["3"]
    with pytest.raises(UserError, match=r"data\.train x:y: no row has a question of type MC"):
        data.without({"0", "2"}).only({"MC"})


def test_sampler_is_a_function_of_seed_stage_and_step():
    sampler = PromptSampler(20, 3, 6, stage="mc")
    steps = [sampler.indices(step) for step in range(1, 30)]
    again = PromptSampler(20, 3, 6, stage="mc")
    assert again.indices(17) == steps[16]
    assert PromptSampler(20, 4, 6, stage="mc").indices(1) != steps[0]
    assert PromptSampler(20, 3, 6, stage="oe").indices(1) != steps[0]


def test_sampler_never_changes():
    """A run resumed with a later version meets the same prompts."""
    assert PromptSampler(10, 0, 4, stage="unified").indices(1) == [3, 4, 0, 2]


@pytest.mark.parametrize(
    ("seed", "stage", "types", "first", "digest"),
    [
        (0, "unified", ("MC", "OE"), ["1954", "30", "1718", "1337"], "bb6e26cf02a019be"),
        (0, "mc", ("MC",), ["958", "1512", "46", "610"], "559ae83e658ca7ed"),
        (1, "oe", ("OE",), ["1091", "41", "179", "399"], "e98fc2c5ed4b27ca"),
    ],
)
def test_order_of_the_quickstart_never_changes(seed, stage, types, first, digest):
    """200 steps as the version took them that the README's table was made with."""
    rows = load_rows("fastcorl.quickstart.data:train")
    source = MapPrompts(rows, seed=seed, stage=stage, prompts_per_step=16, quarantine=Quarantine(0), types=types)
    indices = source.data.indices
    flat = [str(indices[i]) for step in range(1, 201) for i in source.sampler.indices(step)]
    assert flat[:4] == first == ids(source.take(1, 0, 1))[:4]
    assert hashlib.sha256(",".join(flat).encode()).hexdigest()[:16] == digest


def test_every_epoch_has_every_prompt_once():
    sampler = PromptSampler(20, 0, 6)
    flat = [index for step in range(1, 31) for index in sampler.indices(step)]
    epochs = [flat[start : start + 20] for start in range(0, 180, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_a_step(world):
    sampler = PromptSampler(20, 0, 6)
    prompts = source(numbered(20), 6, stage="")
    parts = [sampler.for_rank(5, rank, world) for rank in range(world)]
    assert sorted(index for part in parts for index in part) == sorted(sampler.indices(5))
    assert len({len(part) for part in parts}) == 1
    assert [ids(prompts.take(5, rank, world)) for rank in range(world)] == [[str(i) for i in part] for part in parts]


def test_mistakes():
    with pytest.raises(UserError, match=r"^stages.unified.prompts_per_step 7 does not divide by 2 ranks; "):
        PromptSampler(20, 0, 7, stage="unified").for_rank(1, 0, 2)
    with pytest.raises(UserError, match=r"^stages.unified.prompts_per_step 7 does not divide by 2 ranks; "):
        source(numbered(20), 7).check(2)
    with pytest.raises(UserError, match="stages.mc.prompts_per_step 8 exceeds the 5 prompts"):
        PromptSampler(5, 0, 8, stage="mc")
    with pytest.raises(UserError, match="stages.unified.prompts_per_step 8 exceeds the 5 prompts"):
        source(numbered(10), 8, types=("OE",))
    with pytest.raises(ValueError, match="count from 1"):
        PromptSampler(5, 0, 2).indices(0)
    with pytest.raises(ValueError, match="at most 2"):
        source(numbered(20)).reserve(1, 1, 3, 0, 2)
    with pytest.raises(ValueError, match="at least 1"):
        source(numbered(20)).reserve(1, 0, 1, 0, 2)


def test_reserve_has_other_prompts_each_round():
    """Nothing the step takes, nothing twice, on whatever rank, until all have been given."""
    prompts = source(numbered(20))
    for step in range(1, 12):
        given = ids(prompts.take(step, 0, 1))
        for round in (1, 2):  # blocks 0 and 2 of four others each
            for rank in (0, 1):
                given += ids(prompts.reserve(step, round, 2, rank, 2))
        assert len(given) == len(set(given)) == 12
    again = source(numbered(20))
    assert ids(again.reserve(7, 2, 2, 1, 2)) == ids(prompts.reserve(7, 2, 2, 1, 2))
    assert ids(prompts.reserve(7, 2, 1, 1, 2)) == ids(prompts.reserve(7, 2, 2, 1, 2))[:1]
    assert ids(prompts.reserve(7, 2, 4, 0, 1)) != ids(prompts.reserve(8, 2, 4, 0, 1))


def test_reserve_of_as_many_rows_as_a_step_takes():
    prompts = source(numbered(4))
    assert sorted(ids(prompts.reserve(1, 1, 4, 0, 1))) == ["0", "1", "2", "3"]


def test_no_two_replacements_share_a_block():
    blocks = [reserve_block(round, attempt) for round in range(12) for attempt in range(12)]
    assert len(set(blocks)) == len(blocks)
    assert min(blocks) == -1 == reserve_block(0, 0)


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_row_is_replaced(world):
    """The same row for every number of ranks; the other places keep theirs."""
    rows = numbered(40)
    good = [ids(source(rows).take(step, 0, 1)) for step in range(1, 11)]
    bad = good[2][1]
    rows[int(bad)]["prompt"] = ""
    prompts = source(rows)
    taken = [[""] * 4 for _ in range(10)]
    for step in range(1, 11):
        for rank in range(world):
            taken[step - 1][rank::world] = ids(prompts.take(step, rank, world))
    assert [step for step in range(10) if taken[step] != good[step]] == [2]
    assert taken[2][0::2] == good[2][0::2]
    assert taken[2][3] == good[2][3]
    assert taken[2][1] not in good[2]
    assert taken[2][1] == ids(source(rows).take(3, 0, 1))[1]
    assert list(prompts.quarantine.bad) == [bad]


def test_nothing_but_bad_rows():
    prompts = source([row(prompt="") for _ in range(8)], quarantine=Quarantine(1))
    with pytest.raises(UserError, match=r"row \d: prompt: is empty .and 19 rows before it are bad too"):
        prompts.take(1, 0, 1)
    with pytest.raises(UserError) as error:
        prompts.take(1, 1, 2)
    assert error.value.local  # so that this rank tells it


def test_rows_of_an_unknown_type_are_met_and_not_passed_over():
    rows = numbered(8)
    rows[3]["qa_type"] = "oe"
    rows[5]["qa_type"] = ["OE"]
    prompts = source(rows, 2, types=("OE",))
    taken = [each for step in range(1, 4) for each in ids(prompts.take(step, 0, 1))]
    assert set(taken) <= {"1", "7"}
    assert {each.column for each in prompts.quarantine.bad.values()} == {"qa_type"}


def test_held_out_rows_are_never_trained_on():
    rows = in_memory(numbered(20))
    held, held_ids = hold_out(rows, 5, exclude={"3"})
    assert set(ids(held)) == held_ids
    assert len(held_ids) == 5
    assert "3" not in held_ids
    assert ids(hold_out(rows, 5, exclude={"3"})[0]) == ids(held)
    prompts = source(numbered(20), 3, exclude=held_ids)
    taken = {each for step in range(1, 6) for each in ids(prompts.take(step, 0, 1))}
    assert taken == {str(i) for i in range(20)} - held_ids
    with pytest.raises(UserError, match="data.held_out_rows 20 leaves none"):
        hold_out(rows, 20)


def test_held_out_rows_that_nobody_has_looked_at():
    whole = ids(hold_out(in_memory(numbered(20)), 6)[0])
    rows = numbered(20)
    rows[int(whole[2])]["prompt"] = ""
    quarantine = Quarantine(0.5)
    held, held_ids = hold_out(in_memory(rows), 5, quarantine=quarantine)
    assert ids(held) == [each for each in whole if each != whole[2]]
    assert whole[2] not in held_ids
    assert list(quarantine.bad) == [whole[2]]
