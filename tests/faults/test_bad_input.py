"""What a user can get wrong gives one line and exit code 2 before any training, and writes nothing."""

import io
import sys

import pytest
from datasets import Dataset
from PIL import Image

from fastcorl import train


def png(colour=(255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def row(**changes):
    good = {
        "prompt": "a red three at top left",
        "real_image": {"bytes": png(), "path": None},
        "qa_problem": "how many digits are there?",
        "qa_solution": "<think>a red three at top left</think><answer>one</answer>",
        "qa_type": "OE",
    }
    return {**good, **changes}


@pytest.fixture
def attempt(tmp_path, monkeypatch, capsys):
    """Run the trainer on rows (None: the quickstart's) with options; returns the one line it printed."""

    def run(rows, *options):
        arguments = ["train.py", f"--output_dir={tmp_path / 'runs'}", "--threads=1", *options]
        if rows is not None:
            Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
            arguments += [f"--data.train={tmp_path / 'rows.parquet'}"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as exit_info:
            train.main()
        assert exit_info.value.code == 2
        assert not (tmp_path / "runs").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastcorl:")]
        assert len(lines) == 1
        return lines[0]

    return run


def rows_with(bad):
    """Enough good rows of both types, with the bad one as row 8."""
    return [row() for _ in range(8)] + [bad] + [row(qa_type="MC") for _ in range(8)]


def without(name):
    return [{key: value for key, value in row().items() if key != name} for _ in range(8)]


def test_unreadable_image(attempt):
    line = attempt(rows_with(row(real_image={"bytes": b"not an image", "path": None})))
    assert "row 8" in line
    assert "real_image" in line


def test_missing_column(attempt):
    line = attempt(without("qa_solution"))
    assert "qa_solution" in line
    assert "data.columns" in line


def test_caption_too_long(attempt):
    line = attempt(rows_with(row(prompt="a red three " * 400)))
    assert "row 8" in line
    assert "caption" in line
    assert "data.max_prompt_tokens" in line


def test_question_too_long(attempt):
    line = attempt(rows_with(row(qa_problem="how many? " * 400)))
    assert "row 8" in line
    assert "question" in line


def test_empty_caption(attempt):
    assert "row 8: prompt" in attempt(rows_with(row(prompt="  ")))


def test_a_special_token_in_the_text(attempt):
    line = attempt(rows_with(row(qa_problem="what is <image_placeholder>?")))
    assert "row 8" in line
    assert "<image_placeholder>" in line


def test_no_row_of_a_stages_question_type(attempt):
    line = attempt([row() for _ in range(8)])
    assert "MC" in line


def test_fewer_rows_than_a_step_takes(attempt):
    assert "prompts_per_step" in attempt([row(qa_type="MC"), row()])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--algorithm.group_size=1"], ["algorithm.group_size", "2"]),
        (["--algorithm.groupsize=4"], ["algorithm.groupsize", "group_size"]),
        (["--optimizer.learning_rate=fast"], ["optimizer.learning_rate"]),
        (["--config=configs/nowhere.yaml"], ["configs/nowhere.yaml"]),
        (["--model.path=/no/such/model"], ["model.path", "/no/such/model"]),
        (["--data.train=no/such/rows.parquet"], ["data.train", "no/such/rows.parquet"]),
        (["--data.train=fastcorl.quickstart.data:nothing"], ["data.train", "nothing"]),
        (["--rewards.captioner=/no/such/captioner"], ["rewards.captioner", "/no/such/captioner"]),
        (["--rewards.caption_tuples=nowhere:tuples"], ["rewards.caption_tuples", "nowhere"]),
        (["--evaluation.scorer=nowhere:Scorer"], ["evaluation.scorer", "nowhere"]),
        (["--resume=/no/such/checkpoint"], ["resume", "/no/such/checkpoint"]),
        (["--stages.unified.init=t2i"], ["stages.unified", "t2i"]),
        (["--packing.tokens=20"], ["packing.tokens"]),
        (["--rollout.max_new_tokens=5000"], ["rollout.max_new_tokens", "512"]),
    ],
)
def test_mistakes_in_options(attempt, options, words):
    line = attempt(None, *options)
    assert all(word in line for word in words)


def test_batch_that_does_not_divide(attempt, monkeypatch):
    """Two ranks cannot share seven prompts; checked without a second process."""
    from fastcorl.runtime import distributed

    real_start = distributed.start

    def as_first_of_two(**options):
        alone = real_start(**options)
        return distributed.Distributed(0, 2, alone.device)

    monkeypatch.setattr(distributed, "start", as_first_of_two)
    line = attempt(None, "--stages.unified.prompts_per_step=7")
    assert "stages.unified.prompts_per_step 7 does not divide by 2 ranks" in line


def test_a_caption_that_the_parser_cannot_read(attempt):
    line = attempt(rows_with(row(prompt="a photo of a cat")))
    assert "row 8" in line
    assert "rewards.caption_tuples" in line


def test_a_deepspeed_file_that_disagrees(attempt):
    line = attempt(None, "--deepspeed.config=configs/deepspeed/zero3.json", "--deepspeed.zero_stage=1")
    assert "zero_stage" in line


def test_a_missing_deepspeed_file(attempt):
    assert "nowhere.json" in attempt(None, "--deepspeed.config=nowhere.json")
