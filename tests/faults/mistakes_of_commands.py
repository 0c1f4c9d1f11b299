"""Mistakes of users of the command `fastcorl`; `at_once` are told before torch is imported."""

import json
from pathlib import Path

from tests.faults.mistakes import Mistake, folder, model

NEVER = ["--out", "never"]


def geneval(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text(json.dumps({"tag": "counting", "prompt": ""}) + "\n")


COMMANDS_AT_ONCE = [
    Mistake(["generate"], ("--prompt",)),
    Mistake(["generat"], ("generat",)),
    Mistake([], ("generate",)),
    Mistake(["generate", "--prompt", "x", "--num", "many"], ("--num", "many")),
    Mistake(["generate", "--prompt", "x", "--nmu", "2"], ("--nmu",)),
    Mistake(["generate", "--prompt", "x", "--model", "/no/model"], ("--model: there is no folder '/no/model'; give",)),
    Mistake(["generate", "--prompt", "x", "--num", "0"], ("--num 0: must be at least 1",)),
    Mistake(["generate", "--prompt", "x", "--max-rows", "0"], ("--max-rows 0: must be at least 1",)),
    Mistake(
        ["generate", "--prompt", "x", "--grid", "here"], ("--grid here: is a folder; give the name",), folder("here")
    ),
    Mistake(["generate", "--prompt", "x", "--grid", "a.gif"], ("--grid a.gif: must end in .png or .jpg",)),
    model(
        ("--model: 'model' has no config.json; give",), "generate", "--prompt=x", "--model=model", without="config.json"
    ),
    Mistake(["ask", "--image", "/no/image.png", "--question", "what?"], ("--image /no/image.png: no such file",)),
    Mistake(["ask", "--question", "what?"], ("--image",)),
    Mistake(["evaluate", "--data", "/no/such/rows.parquet"], ("--data /no/such/rows.parquet: no such file or folder",)),
    Mistake(["evaluate", "--model", "quickstart", "quickstart"], ("--model: give at least one model, and each once",)),
    Mistake(["evaluate", "--columns", "promt", "x"], ("--columns: 'promt' is none of our columns (prompt,",)),
    Mistake(["evaluate", "--templates", "MC", "no place"], ("--templates: MC: must contain {question}",)),
    Mistake(["evaluate", "--out", "scores.md"], ("--out scores.md: must end in .json",)),
    Mistake(["evaluate", "--scorer", "nowhere:S"], ("--scorer: nowhere:S: cannot import 'nowhere'", "install it")),
    Mistake(["evaluate", "--num-prompts", "0"], ("--num-prompts 0: must be at least 1",)),
    Mistake(["evaluate", "--questions", "XY"], ("--questions", "XY")),
    Mistake(["merge", "--base=quickstart", "--models", "a", *NEVER], ("--models: gaussian takes two models, got 1",)),
    Mistake(["merge", "--base=a", "--models", "a", "b", "c", *NEVER], ("--models: gaussian takes two models, got 3",)),
    Mistake(
        ["merge", "--base=quickstart", "--models", "quickstart", "x/y/z", *NEVER],
        ("--models: there is no folder 'x/y/z'; give a folder",),
    ),
    Mistake(
        ["merge", "--base=a", "--models", "a", "b", *NEVER, "--density", "0.5"], ("--density is for --method ties",)
    ),
    Mistake(
        ["merge", "--base=a", "--models", "a", "b", *NEVER, "--density", "2", "--method", "ties"],
        ("--density 2.0: must be over 0 and at most 1",),
    ),
    Mistake(
        ["merge", "--base=quickstart", "--models", "quickstart", "quickstart", "--out", "."],
        ("--out .: exists and is not an empty folder; name a new one",),
        folder("here"),
    ),
    Mistake(["export", "--from", "/no/such/model", *NEVER], ("--from: there is no folder '/no/such/model'; give",)),
    Mistake(["export", "--from", "x", "--out", "."], ("--out .: exists and is not an empty folder",), folder("here")),
    Mistake(["export", "--from", "x", *NEVER, "--to", "multi_modality"], ("--to multi_modality needs --like",)),
    Mistake(
        ["export-drawings", "--layout", "wise", "--prompts", "/no/such/prompts.json", *NEVER],
        ("--prompts /no/such/prompts.json: no such file or folder",),
    ),
    Mistake(
        ["export-drawings", "--layout", "geneval", "--prompts", "prompts.jsonl", *NEVER],
        ("prompts.jsonl: line 1: prompt: must be a text that says what to draw",),
        geneval,
    ),
    Mistake(
        ["export-drawings", "--layout", "geneval", "--prompts", "x", *NEVER, "--part", "1"], ("--part 1: must be i/n",)
    ),
    Mistake(["report"], ("report: name the folder of a run, as in fastcorl report runs/quickstart",)),
    Mistake(["report", "/no/such/run"], ("report: /no/such/run: no such folder; name that of a run",)),
    Mistake(["report", "a", "a"], ("report: name each run once",), folder("a")),
    Mistake(["doctor", "--timeout", "0"], ("--timeout 0: must be above 0",)),
    Mistake(["doctor", "--task", "mc"], ("--task: is about a data set; give --data",)),
    Mistake(["doctor", "--data", "no/such/x.parquet"], ("--data no/such/x.parquet: no such file or folder",)),
    Mistake(
        ["doctor", "--data", "fastcorl.quickstart.data:held_out", "--columns", "promt", "x"],
        ("--columns: 'promt' is none of our columns",),
    ),
]

COMMANDS_AFTER_TORCH = [
    Mistake(
        ["generate", "--prompt", "x", "--temperature", "-1"], ("temperature -1.0", "must be numbers of at least 0")
    ),
    Mistake(
        ["generate", "--prompt", "x", "--temperature", "nan"], ("temperature nan", "must be numbers of at least 0")
    ),
    Mistake(["generate", "--prompt", "x", "--guidance", "3", "--max-rows", "1"], ("--max-rows",)),
    Mistake(["generate", "--prompt", "red " * 2000], ("tokens",)),
    Mistake(
        ["ask", "--image", "text.png", "--question", "what?"],
        ("--image text.png: is not one of PNG, JPEG, WEBP",),
        lambda folder: (folder / "text.png").write_text("no"),
    ),
    Mistake(["evaluate", "--device", "nowhere"], ("--device nowhere: ",)),
    Mistake(["evaluate", "--scorer", "os:getcwd"], ("--scorer os:getcwd: makes a str, which cannot be called",)),
    Mistake(["report", "empty"], ("empty: nothing to report",), folder("empty")),
]
