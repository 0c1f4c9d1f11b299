import math

import pytest
import torch

from fastcorl.quickstart.scenes import make_scene
from fastcorl.records import Prompt
from fastcorl.rewards import AccuracyReward, FormatReward, extract_answer
from fastcorl.rewards.answers.options import parse_options
from fastcorl.rewards.answers.rules import accuracy, is_well_formed

MC_QUESTION = "what digit is at top left?\nA. seven\nB. three\nC. two\nD. not a number"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>x</think><answer>B</answer>", "B"),
        ("<answer>\n three \n</answer>", "three"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", None),
        ("<answer>  </answer>", None),
        ("<answer>B", None),
        ("B</answer>", None),
        ("the answer is B", None),
        ("<ANSWER>B</ANSWER>", None),
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a red three</think><answer>B</answer>", True),
        ("<think>two\nlines</think>\n \n<answer>B\n</answer>", True),
        (" <think>a</think><answer>b</answer>\n", True),
        ("<think>1 < 2 > 0</think><answer>b</answer>", True),
        ("<think></think><answer>b</answer>", False),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer>\n</answer>", False),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>.", False),
        ("Sure! <think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think>a<answer>c</answer></think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer></answer>", False),
        ("<think><think>a</think><answer>b</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</think></answer>", False),
        ("<answer>b</answer>", False),
        ("<think>a</think>", False),
        ("<think>a</think><answer>b", False),
        ("<Think>a</Think><answer>b</answer>", False),
        ("b", False),
        ("", False),
    ],
)
def test_is_well_formed(text, expected):
    assert is_well_formed(text) is expected


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("(B)", 1),
        ("(b).", 1),
        ("B)", 1),
        ("three", 1),
        ("Three.", 1),
        ("3", 1),
        ("B. three", 1),
        ("(B) 3", 1),
        ("A", 0),
        ("seven", 0),
        ("E", 0),
        ("B. seven", 0),
        ("A or B", 0),
        ("AB", 0),
        ("B, C", 0),
        ("not B", 0),
        ("the answer is three", 0),
    ],
)
@pytest.mark.parametrize("solution", ["B", "b", "(B)", "B.", "three", "B. three"])
def test_multiple_choice(answer, correct, solution):
    prompt = Prompt("0", "", None, MC_QUESTION, f"<answer>{solution}</answer>", "MC")
    assert accuracy(f"<think>x</think><answer>{answer}</answer>", prompt) == correct


@pytest.mark.parametrize(
    ("question", "solution", "answer", "correct"),
    [
        ("solve\nA. y\nB. x", "B", "x", 1),  # an option's text that is a letter
        ("which letter?\nA. B\nB. A", "B", "B", 1),  # the letter goes before the text
        ("which letter?\nA. B\nB. A", "B", "A", 0),
        ("pick: (A) cat (B) dog", "B", "(b)", 1),  # options in an unknown form: letters still count
        ("(A) cat (B) dog", "B", "b.", 1),
        ("(A) cat (B) dog", "B", "B. dog", 1),
        ("pick one", "the dog", "The dog.", 1),
        ("same\nA. dog\nB. dog", "B", "dog", 0),  # names two options
        ("(A) red\n(B) blue", "B", "blue", 1),
        ("A) red\nB) blue", "A", "blue", 0),
    ],
)
def test_multiple_choice_corners(question, solution, answer, correct):
    prompt = Prompt("0", "", None, question, f"<answer>{solution}</answer>", "MC")
    assert accuracy(f"<answer>{answer}</answer>", prompt) == correct


@pytest.mark.parametrize(
    ("solution", "answer", "correct"),
    [
        ("three", "3", 1),
        ("3", "Three", 1),
        ("twenty", "20", 1),
        ("3", "3.", 1),
        ("3.5", "3.5", 1),
        ("top left", " Top  Left. ", 1),
        ("red", "RED!", 1),
        ("three dogs", "3 dogs", 1),
        ("red", "reddish", 0),
        ("red and blue", "red", 0),  # upstream's Jaccard gives partial credit
        ("a red car", "red car", 1),
        ("3", "4", 0),
        ("3.5", "35", 0),
        ("B", "B", 1),
    ],
)
def test_open_ended(solution, answer, correct):
    prompt = Prompt("0", "", None, MC_QUESTION, f"<answer>{solution}</answer>", "OE")
    assert accuracy(f"<think>x</think><answer>{answer}</answer>", prompt) == correct


def test_open_ended_answers_are_not_mapped_through_options():
    prompt = Prompt("0", "", None, MC_QUESTION, "<answer>three</answer>", "OE")
    assert accuracy("<answer>B</answer>", prompt) == 0


@pytest.mark.parametrize("kind", ["MC", "OE"])
@pytest.mark.parametrize("text", ["B", "three", "<think>three</think>", "<answer>B", ""])
def test_an_answer_without_tags_does_not_count(kind, text):
    solution = "B" if kind == "MC" else "three"
    assert accuracy(text, Prompt("0", "", None, MC_QUESTION, f"<answer>{solution}</answer>", kind)) == 0


def test_a_solution_without_an_answer_cannot_be_scored():
    assert math.isnan(accuracy("<answer>B</answer>", Prompt("0", "", None, MC_QUESTION, "B", "MC")))


def test_an_unknown_question_type_names_the_prompt():
    with pytest.raises(ValueError, match=r"prompt '17'.*'mcq'"):
        accuracy("no answer", Prompt("17", "", None, "", "<answer>B</answer>", "mcq"))


def test_options_are_lines():
    assert parse_options(MC_QUESTION) == {"A": "seven", "B": "three", "C": "two", "D": "not a number"}
    assert parse_options("how many?\n  (A) one \r\n  B) two") == {"A": "one", "B": "two"}
    assert parse_options("Is A. bigger than B?") == {}


def test_every_quickstart_solution_is_right_and_well_formed():
    for index in range(200):
        question = make_scene(0, index, "train").question
        prompt = Prompt("0", "", None, question.problem, question.solution, question.kind)
        assert accuracy(question.solution, prompt) == 1
        assert is_well_formed(question.solution)


def test_each_row_is_judged_by_its_own_question_type(make_rollout):
    """Upstream compares the list of types with "MC", so that every row of a mixed batch is judged as open-ended."""
    answers = ["<answer>1</answer>", "<answer>B</answer>", "<answer>b.</answer>", "<answer>top right</answer>"]
    rollout = make_rollout(answers, images=False)
    reward = AccuracyReward()(rollout)
    assert reward.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert reward.dtype == torch.float32


def test_format_reward(make_rollout):
    rollout = make_rollout(["<think>a</think><answer>b</answer>", "b", "", "<answer>b</answer>"], images=False)
    reward = FormatReward()(rollout)
    assert reward.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert reward.dtype == torch.float32
