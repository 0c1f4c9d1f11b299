"""`fastcorl export`."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import tyro
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from fastcorl.commands.export import Export
from fastcorl.errors import UserError
from fastcorl.model import convert, load_policy
from fastcorl.model.loading import QUICKSTART_WEIGHTS

QUICKSTART = QUICKSTART_WEIGHTS / "janus"


def export(*arguments):
    tyro.cli(Export, args=list(map(str, arguments))).run()


def test_an_original_checkpoint_becomes_one_of_transformers(original, reference, tmp_path, capsys):
    export("--from", original, "--out", tmp_path / "new", "--dtype", "bfloat16")
    assert "bfloat16; 5 unused tensors left out" in capsys.readouterr().out
    loaded = load_policy(tmp_path / "new", dtype=torch.bfloat16)
    assert torch.equal(loaded.text_head.weight, reference.lm_head.weight.bfloat16())


def test_and_back(original, original_tensors, tmp_path):
    export("--from", original, "--out", tmp_path / "new")
    export("--from", tmp_path / "new", "--out", tmp_path / "back", "--to", "multi_modality", "--like", original)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == original_tensors.keys()
    assert all(torch.equal(tensor, original_tensors[name]) for name, tensor in back.items())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_checkpoint_of_transformers_is_copied_clean(tmp_path, dtype):
    shutil.copytree(QUICKSTART, tmp_path / "source")
    (tmp_path / "source" / "optimizer.bin").write_text("not part of a model")
    chosen = [] if dtype == "float16" else ["--dtype", dtype]  # float16 is what is shipped
    export("--from", tmp_path / "source", "--out", tmp_path / "new", *chosen)
    before, after = (load_file(folder / "model.safetensors") for folder in (QUICKSTART, tmp_path / "new"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    names = {path.name for path in QUICKSTART.iterdir()} | {"README.md"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    assert load_policy(tmp_path / "new").encoder.draw("a red 3") == load_policy("quickstart").encoder.draw("a red 3")


def test_a_hub_name_is_fetched(original, tmp_path, monkeypatch):
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, allow_patterns: asked.append(name) or str(original))
    monkeypatch.setattr(convert, "snapshot_download", hub.snapshot_download)
    export("--from", "deepseek-ai/Janus-Pro-1B", "--out", tmp_path / "new")
    assert asked == ["deepseek-ai/Janus-Pro-1B"] and (tmp_path / "new" / "model.safetensors").exists()


def test_a_hub_out_of_reach(tmp_path, monkeypatch):
    def out_of_reach(*_, **__):
        raise LocalEntryNotFoundError("no connection\nand more about it")

    monkeypatch.setattr(convert, "snapshot_download", out_of_reach)
    with pytest.raises(UserError, match=r"^--from deepseek-ai/Janus-Pro-1B: no such folder, .*no connection"):
        export("--from", "deepseek-ai/Janus-Pro-1B", "--out", tmp_path / "new")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from", "{tmp}/missing"], r"^--from: there is no folder .*missing.; give a folder"),
        (["--from", "{tmp}/run"], r"^--from .*holds several checkpoints; name one of them: merge, t2i"),
        (["--from", "{tmp}/empty"], r"^--from .*config\.json: no such file"),
        (["--from", "{tmp}/gpt2"], r"^--from .*is a 'gpt2' model, not a Janus"),
        (["--from", "{tmp}/broken"], r"^--from .*broken.* (?!model\.path)"),
        (["--from", "{tmp}/original", "--out", "{tmp}/run"], r"^--out .*run: exists and is not an empty folder"),
        (["--from", "{tmp}/original", "--to", "multi_modality"], r"^--to multi_modality needs --like"),
        (["--from", "{tmp}/original", "--like", "{tmp}/original"], r"^--to multi_modality needs --like"),
        (
            ["--from", "{tmp}/broken", "--to", "multi_modality", "--like", "{tmp}/broken"],
            r"^--like .*is not in the original layout",
        ),
        (
            ["--from", "{tmp}/original", "--to", "multi_modality", "--like", "{tmp}/original"],
            r"^--from .*is in the original layout already",
        ),
    ],
)
def test_mistakes_name_the_flag(original, tmp_path, arguments, message):
    for stage in ("t2i", "merge"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copytree(QUICKSTART, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x10\x00")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(UserError, match=message):
        export(*([] if "--out" in arguments else ["--out", tmp_path / "new"]), *arguments)
    assert not (tmp_path / "new").exists()
