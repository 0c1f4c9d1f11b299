"""`fastcorl doctor --data`: what it prints, and its exit codes."""

import pytest
import tyro

from fastcorl.commands.doctor import Doctor
from fastcorl.errors import main_guard
from tests.data.examples import numbered, png, row, write_hub_layout, write_jsonl, write_parquet


def doctor(capsys, *arguments) -> tuple[int, str]:
    """Exit code, and all that is printed."""
    code = 0
    try:
        with main_guard():
            tyro.cli(Doctor, args=list(map(str, arguments))).run()
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_good_data_set(capsys, tmp_path):
    rows = [row(prompt=f"c{i}", qa_type=("MC", "OE", "OE")[i % 3]) for i in range(6)]
    rows[5]["real_image"] = {"bytes": png((64, 48)), "path": None}
    code, text = doctor(capsys, "--data", write_parquet(tmp_path / "x.parquet", rows), "--model", "quickstart")
    assert code == 0
    assert "rows       6, looked at 6" in text
    assert "questions  2 MC, 4 OE" in text
    assert "images     8x6 to 64x48, median 8x6" in text
    assert "tokens     captions: median" in text
    assert "tokens     questions: median" in text
    assert "bad rows   0 of 6 (0.00 %, allowed 1 %): fine" in text


def test_bad_rows(capsys, tmp_path):
    rows = numbered(40)
    for index in range(3, 36, 3):
        rows[index]["qa_solution"] = f"{index}"
    rows[39]["real_image"] = {"bytes": png((300, 300))[:-40], "path": None}
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    code, text = doctor(capsys, "--data", path)
    assert code == 1
    assert "bad rows   12 of 40 (30.00 %, allowed 1 %): too many" in text
    assert "  row 3: qa_solution: has no <answer>...</answer> with something in it" in text
    assert text.count("  row ") == 10
    assert "       11  qa_solution: has no <answer>" in text
    assert "        1  real_image: does not decode" in text
    assert doctor(capsys, "--data", path, "--max-bad-fraction", "0.3")[0] == 0
    code, text = doctor(capsys, "--data", path, "--max-rows", "3")
    assert (code, "looked at 3" in text) == (0, True)


def test_task_and_columns(capsys, tmp_path):
    rows = [{"text": f"c{i}", "real_image": row()["real_image"]} for i in range(4)]
    path = write_parquet(tmp_path / "x.parquet", rows)
    code, text = doctor(capsys, "--data", path, "--task", "t2i", "--columns", "prompt", "text")
    assert code == 0
    assert "columns    prompt = text, real_image" in text
    assert "questions" not in text
    code, text = doctor(capsys, "--data", path, "--task", "t2i")
    assert code == 2
    assert "no column 'prompt' (found: text, real_image); name yours as in --columns prompt text" in text


def test_questions_of_one_type(capsys, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [row() for _ in range(4)])
    code, text = doctor(capsys, "--data", path, "--task", "mc")
    assert code == 1
    assert "no good row has one of type MC, which task mc needs" in text
    rows = [{name: value for name, value in each.items() if name != "qa_type"} for each in numbered(4)]
    code, text = doctor(capsys, "--data", write_parquet(tmp_path / "y.parquet", rows), "--task", "mc")
    assert (code, "questions  4 MC" in text) == (0, True)


def test_streaming(capsys, tmp_path):
    folder = write_hub_layout(tmp_path / "set", [numbered(5), numbered(5, 5)])
    code, text = doctor(capsys, "--data", folder, "--streaming", "--max-rows", "7")
    assert code == 0
    assert "rows       a stream of 2 shards, looked at 7" in text


def test_lengths(capsys, tmp_path):
    rows = [row(prompt="a red three"), row(prompt="a red three " * 300)]
    path = write_parquet(tmp_path / "x.parquet", rows)
    code, text = doctor(capsys, "--data", path, "--model", "quickstart", "--max-prompt-tokens", "100")
    assert code == 1
    assert "row 1: prompt: caption has" in text
    assert "tokens, --max-prompt-tokens is 100" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "mc"], "--task: is about a data set; give --data"),
        (["--data", "no/such/x.parquet"], "fastcorl: --data no/such/x.parquet: no such file or folder"),
        (["--data", "fastcorl.quickstart.data:train", "--max-rows", "0"], "--max-rows 0: must be at least 1"),
        (["--data", "fastcorl.quickstart.data:train", "--max-bad-fraction", "2"], "must be from 0 to 1"),
        (["--data", "fastcorl.quickstart.data:train", "--model", "/no/such"], "--model /no/such: no processor"),
    ],
)
def test_mistakes(arguments, words, capsys):
    code, text = doctor(capsys, *arguments)
    assert code == 2
    assert words in text
    assert len(text.splitlines()) == 1
