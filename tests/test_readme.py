"""The README's example does what it says."""

import re
from pathlib import Path
from types import SimpleNamespace

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run():
    reward, ours, drop_in = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(reward, names)
    rollout = SimpleNamespace(texts=SimpleNamespace(answers=["short", "long" * 20]))
    assert names["short_answers"](rollout) == [1.0, 0.0]
    assert names["short_answers"](SimpleNamespace(texts=None)) is NotImplemented
    exec(ours, names)
    assert names["hidden"].grad.shape == (6, 64)
    assert names["head"].grad.shape == (1000, 64)
    assert names["result"].loss.isfinite()
    exec(drop_in, names)
    assert names["loss"].isfinite() and names["logits"].grad.shape == (2, 5, 1000)


def test_paths_in_the_tree_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    root = Path(__file__).parents[1]
    folder = root
    for line in tree.strip().splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folder = root if not line.startswith(" ") else root / "fastcorl"
        for name in names:
            assert (folder / name).exists(), name
