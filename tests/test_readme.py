"""The README's example does what it says."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run():
    ours, drop_in = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
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
