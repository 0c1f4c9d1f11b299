"""`fastcorl push`: huggingface_hub's own client, and a stand-in for the hub that it talks to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

import fastcorl
from fastcorl.cli import main
from tests.hub_stand_in import TOKEN, Failure, Repository, running

QUICKSTART = Path(fastcorl.__file__).parent / "quickstart" / "weights" / "janus"
CARD = "---\nlibrary_name: transformers\nbase_model: owner/base\n---\n\n# A model\n"
NAME = "you/model"


@pytest.fixture
def export(tmp_path):
    """An export, as a stage leaves it."""
    folder = tmp_path / "unified"
    shutil.copytree(QUICKSTART, folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def hub(monkeypatch):
    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub, branch="main"):
    return hub.repositories[NAME].branches[branch]


def refused(capsys, *arguments):
    """The one line that is said of it."""
    with pytest.raises(SystemExit) as end:
        main(["push", *map(str, arguments)])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastcorl: push: ")
    return lines[0]


def test_from_a_shell_the_hub_gets_the_export_to_the_byte_and_nothing_else(export, tmp_path):
    (export / "adapter").mkdir()
    (export / "adapter" / "adapter_config.json").write_text("{}")
    whole = contents(export)
    (export / "optimizer.bin").write_text("no part of an export")
    (export / "adapter" / "notes.txt").write_text("neither")
    (export / ".env").write_text("HF_TOKEN=secret")
    with running() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "fastcorl.cli", "push", str(export), NAME, "--message", "ten steps"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.endpoint}/{NAME}: {len(whole)} files, 6.5 MB\n"
    assert ".env, optimizer.bin" in done.stderr
    assert pushed(hub) == whole
    assert any(request.startswith("PUT /storage/") for request in hub.seen)
    assert hub.messages == ["ten steps"] and not hub.repositories[NAME].private


def test_weights_of_a_former_push_go_and_other_files_stay(export, hub):
    old = {"model.safetensors": b"old", "adapter/adapter_config.json": b"{}", "demo.png": b"a user's"}
    hub.repositories[NAME] = Repository(branches={"main": dict(old)})
    (export / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, shard in enumerate(shards):
        save_file({f"weight.{number}": np.full(4, number, np.float32)}, export / shard)
    weight_map = {f"weight.{number}": shard for number, shard in enumerate(shards)}
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    main(["push", str(export), NAME])
    assert pushed(hub) == contents(export) | {"demo.png": b"a user's"}


def test_what_is_there_already_is_not_sent_again(export, hub, capsys):
    main(["push", str(export), NAME])
    commits, sent = len(hub.messages), len(hub.objects)
    main(["push", str(export), NAME])
    assert (len(hub.messages), len(hub.objects)) == (commits, sent)
    assert capsys.readouterr().out.count(f"{hub.endpoint}/{NAME}: ") == 2


def test_a_branch_is_made(export, hub, capsys):
    main(["push", str(export), NAME, "--revision", "step-40"])
    assert pushed(hub, "step-40") == contents(export) and pushed(hub) == {}
    assert f"{NAME}/tree/step-40" in capsys.readouterr().out


def test_private_is_private_or_nothing(export, hub, capsys):
    main(["push", str(export), NAME, "--private"])
    assert hub.repositories[NAME].private and pushed(hub) == contents(export)
    hub.repositories[NAME] = Repository(private=False)
    assert "public" in refused(capsys, export, NAME, "--private")
    assert pushed(hub) == {}


def test_a_stage_of_a_run(export, hub, tmp_path, capsys):
    run = tmp_path / "runs" / "first"
    for stage in ("unified", "tmp-t2i", "abandoned-mc"):
        shutil.copytree(export, run / "export" / stage)
    main(["push", str(run), NAME])
    assert pushed(hub) == contents(export)
    assert "(unified)" in refused(capsys, run, NAME, "--stage", "t2i")
    shutil.copytree(export, run / "export" / "t2i")
    assert "--stage" in refused(capsys, run, NAME)
    (run / "export" / "t2i" / "README.md").write_text(CARD + "\nof t2i\n")
    main(["push", str(run), NAME, "--stage", "t2i"])
    assert pushed(hub)["README.md"].endswith(b"of t2i\n")
    assert "omit --stage" in refused(capsys, export, NAME, "--stage", "unified")
    shutil.rmtree(run / "export")
    (run / "export").mkdir()
    assert "no stage" in refused(capsys, run, NAME)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "safetensors"),
        ("README.md", "no model card, README.md"),
        (".", "no such folder"),
    ],
)
def test_an_export_that_is_not_whole_is_not_pushed(export, hub, capsys, missing, told):
    shutil.rmtree(export) if missing == "." else (export / missing).unlink()
    assert told in refused(capsys, export, NAME)
    assert hub.seen == []


def test_weights_that_are_cut_short_are_not_pushed(export, hub, capsys):
    os.truncate(export / "model.safetensors", 1000)
    assert "damaged" in refused(capsys, export, NAME)
    assert hub.seen == []


@pytest.mark.parametrize("name", ["model", "you/model/more", "you/mo del", "you/model.git", "you/.model"])
def test_names_that_the_hub_cannot_have(export, hub, capsys, name):
    assert repr(name) in refused(capsys, export, name)
    assert hub.seen == []


def test_without_a_token(export, hub, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "hf auth login" in refused(capsys, export, NAME)
    assert hub.seen == []


@pytest.mark.parametrize(
    ("request_failing", "failure", "told"),
    [
        ("repos/create", Failure(403, "no rights to you"), "may not write to you/model"),
        ("repos/create", Failure(500, "out of order"), "(500: out of order)"),
        ("PUT /storage", Failure(403, "signature expired"), "(403: signature expired)"),
        ("/commit/", Failure(403, "read-only token"), "may not write to you/model"),
        ("/tree/", Failure(404, "Repository not found", "RepoNotFound"), "check the name you/model"),
        ("validate-yaml", Failure(400, "pipeline_tag is unknown"), "pipeline_tag is unknown"),
    ],
)
def test_what_the_hub_refuses(export, hub, capsys, request_failing, failure, told):
    hub.failures[request_failing] = failure
    assert told in refused(capsys, export, NAME)
    assert hub.messages == []


def test_a_token_that_is_not_valid(export, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    line = refused(capsys, export, NAME)
    assert "hf auth login" in line and "401" in line and "hf_another" not in line


def test_a_card_that_the_hub_refuses(export, hub, capsys):
    (export / "README.md").write_text("---\nbase_model: runs/first/export/unified\n---\n")
    assert "is not a valid model id" in refused(capsys, export, NAME)
    assert hub.messages == []


def test_a_hub_that_is_not_there(export, hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refused(capsys, export, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, export, NAME)
