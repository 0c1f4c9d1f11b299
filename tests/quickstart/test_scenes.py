"""Scenes, captions, questions and the independent scorer."""

import random

import numpy as np
import pytest
import torch

from fastcorl.quickstart import data
from fastcorl.quickstart.grammar import CELLS, COLOURS, DIGITS, Item, ask, caption, parse_caption, scene_tuples
from fastcorl.quickstart.scenes import NUM_TRAIN_DIGITS, glyphs, make_scene, render, sample_items
from fastcorl.quickstart.scorer import Scorer, read
from fastcorl.rewards import extract_answer


def to_pixels(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_captions_parse_back_to_their_items():
    rng = random.Random(0)
    for _ in range(500):
        items = sample_items(rng)
        assert parse_caption(caption(items)) == items


def test_parser_ignores_what_is_outside_the_grammar():
    assert parse_caption("a red three at top left and a mauve seven at bottom right") == (Item(3, "red", 0),)
    assert parse_caption("") == ()


def test_scene_tuples_tell_equal_digits_apart():
    tuples = scene_tuples("a red one at top left and a blue one at top right")
    assert tuples == {
        ("one",),
        ("one", "red"),
        ("one", "at", "top left"),
        ("one#2",),
        ("one#2", "blue"),
        ("one#2", "at", "top right"),
    }


@pytest.mark.parametrize("kind", ["MC", "OE"])
def test_questions_have_one_right_tagged_answer(kind):
    rng = random.Random(1)
    for _ in range(300):
        items = sample_items(rng)
        question = ask(items, rng, kind)
        answer = extract_answer(question.solution)
        if kind == "MC":
            options = dict(line.split(". ") for line in question.problem.splitlines()[1:])
            assert list(options) == list("ABCD")
            assert len(set(options.values())) == 4
            answer = options[answer]
        true_answers = {"one", "two", "three"} | {DIGITS[i.digit] for i in items}
        true_answers |= {i.colour for i in items} | {CELLS[i.cell] for i in items}
        assert answer in true_answers


def test_a_where_question_is_asked_only_of_a_unique_colour():
    items = (Item(1, "red", 0), Item(2, "red", 3))
    rng = random.Random(2)
    assert not any("where" in ask(items, rng, "OE").problem for _ in range(100))


def test_splits_share_no_glyph():
    train = {glyph.tobytes() for stack in glyphs("train").values() for glyph in stack}
    held_out = {glyph.tobytes() for stack in glyphs("held_out").values() for glyph in stack}
    assert len(train) + len(held_out) <= 1797
    assert sum(len(stack) for stack in glyphs("train").values()) == NUM_TRAIN_DIGITS
    assert not train & held_out


def test_scenes_are_a_function_of_seed_index_and_split():
    first, again, other = make_scene(3, 7, "train"), make_scene(3, 7, "train"), make_scene(3, 8, "train")
    assert np.array_equal(first.image, again.image)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


def test_rows_have_the_columns_of_the_unified_data_set():
    rows = data.held_out()
    assert set(rows[0]) == {"prompt", "real_image", "qa_problem", "qa_solution", "qa_type"}
    assert [rows[i]["qa_type"] for i in range(4)] == ["MC", "OE", "MC", "OE"]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_scorer_reads_rendered_scenes():
    scenes = [make_scene(11, index, "held_out") for index in range(200)]
    scores = Scorer()([scene.caption for scene in scenes], to_pixels([scene.image for scene in scenes]))
    assert scores["digit"] > 0.99
    assert scores["colour"] == scores["position"] == scores["count"] == 1
    assert scores["overall"] > 0.98


def test_scorer_notices_each_kind_of_mistake():
    rng = random.Random(3)
    asked = (Item(3, "red", 0), Item(7, "blue", 3))
    mistakes = {
        "digit": (Item(4, "red", 0), Item(7, "blue", 3)),
        "colour": (Item(3, "green", 0), Item(7, "blue", 3)),
        "position": (Item(3, "red", 1), Item(7, "blue", 3)),
        "count": (Item(3, "red", 0),),
    }
    for name, drawn in mistakes.items():
        scores = Scorer()([caption(asked)], to_pixels([render(drawn, rng, "train")]))
        assert scores[name] < 1, name
        assert scores["overall"] == 0, name
    blank = Scorer()([caption(asked)], torch.zeros(1, 3, 32, 32))
    assert set(blank.values()) == {0.0}


def test_scorer_reads_every_colour():
    rng = random.Random(4)
    for colour in COLOURS:
        (items,) = read(to_pixels([render((Item(5, colour, 2),), rng, "train")]))
        assert items[0].colour == colour
