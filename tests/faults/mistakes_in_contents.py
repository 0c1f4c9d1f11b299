"""Mistakes that train.py tells after torch is imported and before the first step: in what files and modules hold."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.mistakes import WEIGHTS, Mistake, config_of, model

MODULE = "mine.py"
CAPTIONER = ("--rewards.captioner", "model")


def rows(*changes: dict[str, Any], good: int = 8) -> list[dict[str, Any]]:
    """`good` rows of each type with the changed ones between them."""
    from tests.data.examples import png, row

    plain = {"prompt": "a red three at top left", "real_image": {"bytes": png((32, 32)), "path": None}}
    first, last = ([row(**plain, qa_type=kind) for _ in range(good)] for kind in ("OE", "MC"))
    return [*first, *(row(**plain) | change for change in changes), *last]


def data(
    words: Sequence[str],
    make_rows: Callable[[], list],
    *options: str,
    name: str = "rows.parquet",
    key: str = "data.train",
) -> Mistake:
    """A file of rows."""

    def make(folder: Path) -> None:
        from tests.data.examples import write_jsonl, write_parquet

        (write_parquet if name.endswith(".parquet") else write_jsonl)(folder / name, make_rows())

    return Mistake([f"--{key}", name, *options], (f"{key} {name}", *words), make)


def bad(words: Sequence[str], **change: Any) -> Mistake:
    """One bad row among good ones."""
    return data(("row 8", *words, "1 of 17 rows are bad, more than data.max_bad_fraction"), lambda: rows(change))


def raw(name: str, content: bytes, *words: str) -> Mistake:
    return Mistake(
        ["--data.train", name], ("data.train", name, *words), lambda folder: (folder / name).write_bytes(content)
    )


def module(code: str, words: Sequence[str], *options: str) -> Mistake:
    """A module of the user's in the current folder."""
    return Mistake(list(options), tuple(words), lambda folder: (folder / MODULE).write_text(code))


def without_column(name: str) -> Callable[[], list]:
    return lambda: [{key: value for key, value in each.items() if key != name} for each in rows()]


def lacking(tensor: str) -> Mistake:
    """A model whose weights lack a tensor."""

    def make(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        model((), model__safetensors=b"").make(folder)
        tensors = load_file(WEIGHTS / "janus" / "model.safetensors")
        save_file(
            {name: array for name, array in tensors.items() if name != tensor}, folder / "model" / "model.safetensors"
        )

    return Mistake(
        ["--model.path", "model"],
        ("model.path: 'model' lacks 1 tensors, the first is", tensor, "all files of a Janus"),
        make,
    )


MODELS = [
    lacking("lm_head.weight"),
    model(("model.path: cannot load 'model'", "all files of a Janus"), without="tokenizer.json"),
    model(("model.path: cannot load 'model'", "all files of a Janus"), without="processor_config.json"),
    model(
        ("model.path: 'model' has no chat template (chat_template.jinja)", "all files"), without="chat_template.jinja"
    ),
    model(
        ("model.path: 'model': its config.json is wrong",), config__json=config_of(text_config={"hidden_size": "wide"})
    ),
    model(("rewards.captioner: cannot load 'model'", "it is a 'janus' model; expected 'blip'"), *CAPTIONER),
    model(("rewards.captioner: cannot load 'model'",), *CAPTIONER, of="captioner", model__safetensors=b"\x10\x00"),
    Mistake(["--model.attention", "flash_attn"], ("model.attention", "flash_attn")),
]

MODULES = [
    Mistake(
        ["--data.train", "fastcorl.quickstart.data:nothing"], ("data.train: ", "has no 'nothing'; it has", "train")
    ),
    module("rows = 3", ("data.train mine:rows: is not a function",), "--data.train", "mine:rows"),
    module("def rows(): return 3", ("data.train mine:rows: returned a int, not a seq",), "--data.train", "mine:rows"),
    module("def rows(): return []", ("data.train mine:rows: has no rows",), "--data.train", "mine:rows"),
    module(
        "import absent",
        ("rewards.extra: mine:f: cannot import", "'absent'", "install it"),
        "--rewards.extra",
        "mine:f",
        "1",
    ),
    module(
        "1 / 0", ("rewards.extra: mine:f: cannot import 'mine': ZeroDivisionError",), "--rewards.extra", "mine:f", "1"
    ),
    module("f = 3", ("rewards.extra: mine:f is not a function",), "--rewards.extra", "mine:f", "1"),
    module("def g(): ...", ("rewards.extra: mine:f: 'mine' has no 'f'; it has g",), "--rewards.extra", "mine:f", "1"),
    module("g = 3", ("rewards.caption_tuples: mine:f: 'mine' has no 'f'",), "--rewards.caption_tuples", "mine:f"),
    module("def S(): ...", ("evaluation.scorer mine:S: makes a NoneType, which",), "--evaluation.scorer", "mine:S"),
]

ROWS = [
    raw("empty.parquet", b"", "not a readable parquet file, copy or write it again"),
    raw("text.parquet", b"prompt,image\n", "not a readable parquet file, copy or write it again"),
    raw("empty.jsonl", b"", "has no rows"),
    raw("rows.jsonl", b"red\n", "row 0: must be a mapping of columns", "not valid JSON"),
    raw("rows.json", b"{}", "must be a list of rows"),
    raw("rows.txt", b"a\n", "must be .parquet, .jsonl, .json, or a folder"),
    data(("no column 'qa_solution'", "name yours in data.columns"), without_column("qa_solution")),
    data(("no column 'text'", "name yours in data.columns"), rows, "--data.columns", "prompt", "text"),
    data(("no row has a question of type MC",), lambda: rows()[:8]),
    data((), lambda: rows(good=2))._replace(words=("prompts_per_step 8 exceeds the 4 prompts there are; lower it",)),
    data(("held_out_rows 256 leaves none of the 16 rows",), rows, "--data.held_out", "None"),
    data(
        ("row 8: prompt: rewards.caption_tuples finds nothing", "rewards.caption_similarity (jaccard, spice_py"),
        lambda: rows({"prompt": "a photo of a cat"}),
    ),
    bad(("real_image", "is not one of PNG"), real_image={"bytes": b"not an image", "path": None}),
    bad(("prompt: caption has", "data.max_prompt_tokens is 256"), prompt="a red three " * 400),
    bad(("qa_problem: question has", "data.max_prompt_tokens is 256"), qa_problem="how many? " * 400),
    bad(("prompt: is empty",), prompt="  "),
    bad(("qa_problem: question contains '<image_placeholder>'",), qa_problem="what is <image_placeholder>?"),
    Mistake(
        ["--packing.tokens", "20", "--data.check_rows", "used"], ("packing.tokens 20 must hold the longest sequence",)
    ),
    Mistake(
        ["--rollout.max_new_tokens", "5000", "--data.check_rows", "used"],
        ("rollout.max_new_tokens", "context is 512; lower rollout.max_new"),
    ),
    Mistake(["--algorithm.pair_similarity", "true"], ("algorithm.pair_similarity needs a column pair_similarity",)),
]

CONTENTS = [*MODELS, *MODULES, *ROWS]
