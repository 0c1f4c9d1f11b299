"""Checkpoints: what is bad is found and told, what is good is kept, and a kill or a full disk leaves no half of one."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastcorl.errors import UserError
from fastcorl.runtime.checkpoints import Checkpoints, Position, problem_of
from fastcorl.runtime.durable import placed
from tests.loop.launching import REPOSITORY, environment

FILES = {"state.bin": bytes(range(256)) * 8, "deepspeed/rank0.bin": b"moments" * 100}


def save(checkpoints, step, *, keep=2, content=FILES):
    def write(folder):
        for name, data in content.items():
            if not (folder / name).parent.exists():
                (folder / name).parent.mkdir()
            (folder / name).write_bytes(data)

    position = Position("unified", step, step, 1, "plain", 0)
    return checkpoints.save(position, write, lambda told: [told], main=True, keep=keep)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", "the configuration's hash")
    for step in (1, 2):
        assert save(made, step) is None
    return made


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def flipped(offset):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[offset * len(data) // 10] ^= 1 << offset % 8
        path.write_bytes(data)

    return flip


DAMAGES = {
    **{f"a bit at {offset}0 %": flipped(offset) for offset in range(10)},
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "backwards": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*FILES, "position.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(checkpoints, file, damage):
    path = checkpoints.folder / "step-2" / file
    before = path.read_bytes()
    DAMAGES[damage](path)
    found, lines = checkpoints.find("auto")
    if path.exists() and file == "manifest.json" and damage.startswith("a bit") and problem_of(path.parent) is None:
        assert json.loads(path.read_text()) == json.loads(before)  # white space for white space
        return
    assert found.folder.name == "step-1"
    assert found.position.step == 1
    (line,) = lines
    assert "step-2" in line and file in line and "\n" not in line
    with pytest.raises(UserError, match="step-2"):
        checkpoints.find(str(checkpoints.folder / "step-2"))


def test_a_file_too_many_is_named(checkpoints):
    (checkpoints.folder / "step-2" / "deepspeed" / "rank1.bin").write_bytes(b"of another run")
    assert "deepspeed/rank1.bin is not in its manifest.json" in checkpoints.find("auto")[1][0]


def test_no_whole_checkpoint_is_none_at_all(checkpoints):
    for folder in checkpoints.steps():
        (folder / "manifest.json").unlink()
    found, lines = checkpoints.find("auto")
    assert found is None
    assert [line.split(" is not used")[0][-6:] for line in lines] == ["step-2", "step-1"]


def test_the_manifest_says_what_was_saved_under_what(checkpoints):
    manifest = json.loads((checkpoints.folder / "step-2" / "manifest.json").read_text())
    assert manifest["config"] == "the configuration's hash"
    assert manifest["world_size"] == 1
    assert set(manifest["versions"]) >= {"python", "torch", "fastcorl"}
    assert set(manifest["files"]) == {*FILES, "position.json"}
    assert manifest["files"]["state.bin"]["size"] == len(FILES["state.bin"])


def test_the_newest_are_kept_and_latest_points_at_the_last(checkpoints):
    save(checkpoints, 3)
    save(checkpoints, 10)
    assert names(checkpoints) == ["latest", "step-10", "step-3"]
    assert (checkpoints.folder / "latest").read_text() == "step-10\n"


@pytest.mark.parametrize("keep", [1, 2])
def test_the_whole_one_is_kept_beside_bad_ones_of_higher_numbers(checkpoints, keep):
    for step in (8, 9):
        shutil.copytree(checkpoints.folder / "step-2", checkpoints.folder / f"step-{step}")
        (checkpoints.folder / f"step-{step}" / "state.bin").write_bytes(b"")
    save(checkpoints, 3, keep=keep)
    assert checkpoints.find("auto")[0].position.step == 3


def test_folders_of_other_names_are_the_users(checkpoints):
    for name in ("step-best", "step-1-good"):
        (checkpoints.folder / name).mkdir(parents=True)
    (checkpoints.folder / "step-1.tar.gz").touch()
    save(checkpoints, 3, keep=1)
    assert [path.name for path in checkpoints.steps()] == ["step-3"]
    assert len(list(checkpoints.folder.glob("step-*"))) == 4


def test_nothing_is_removed_after_a_step_that_was_not_finite(checkpoints):
    save(checkpoints, 3, keep=None)
    assert len(checkpoints.steps()) == 3


def test_a_bad_one_is_written_again_and_a_whole_one_is_not(checkpoints):
    save(checkpoints, 2, content={"state.bin": b"other"})
    assert (checkpoints.folder / "step-2" / "state.bin").read_bytes() == FILES["state.bin"]
    (checkpoints.folder / "step-2" / "state.bin").unlink()
    save(checkpoints, 2)
    assert problem_of(checkpoints.folder / "step-2") is None


def test_an_export_that_fails_leaves_the_former_one(tmp_path):
    with placed(tmp_path / "oe") as folder:
        (folder / "model").write_text("first")
    with pytest.raises(OSError), placed(tmp_path / "oe") as folder:
        (folder / "model").write_text("sec")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["oe"]
    assert (tmp_path / "oe" / "model").read_text() == "first"


def test_a_disk_that_is_full_at_any_point_leaves_the_older_checkpoint_and_no_half(checkpoints, monkeypatch):
    """Every call that needs room fails in turn, until a save meets none that does."""
    real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir")}
    real_open = Path.open
    calls, fatal = 0, 0

    def failing(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return call

    def open_path(path, mode="r", *arguments, **options):
        opening = failing(real_open) if "w" in mode else real_open
        return opening(path, mode, *arguments, **options)

    for name, function in real.items():
        monkeypatch.setattr(os, name, failing(function))
    monkeypatch.setattr(Path, "open", open_path)
    problem, failures = "", 0
    while problem is not None:
        fatal, calls = failures + 1, 0
        problem = save(checkpoints, 3)
        failures += problem is not None
        found, lines = checkpoints.find("auto")
        assert lines == []
        assert found.position.step >= 2
        assert problem is None or ("No space left" in problem and "\n" not in problem)
        assert not any(name.startswith("tmp-") for name in names(checkpoints))
        if found.position.step == 3 and problem is not None:
            shutil.rmtree(checkpoints.folder / "step-3")
    assert failures >= 15


FULL_DISK = """
import sys
from pathlib import Path
sys.path[:0] = [{repository!r}, {kernels!r}]
from tests.faults.test_checkpoints import Checkpoints, names, save
checkpoints = Checkpoints(Path({folder!r}) / "checkpoints", "")
for step in (1, 2):
    assert save(checkpoints, step, content={{"state.bin": bytes(100_000)}}) is None
print(save(checkpoints, 3, content={{"state.bin": bytes(2_000_000)}}))
print(names(checkpoints), checkpoints.find("auto")[0].position.step)
"""


def test_a_disk_that_is_really_full(tmp_path):
    script = FULL_DISK.format(repository=str(REPOSITORY), kernels=str(REPOSITORY / "kernels"), folder=str(tmp_path))
    (tmp_path.parent / "full.py").write_text(script)
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} {tmp_path.parent / 'full.py'}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("no mounts of one's own here")
    result = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount], text=True, capture_output=True, check=False, env=environment()
    )
    assert result.stdout.splitlines() == ["[Errno 28] No space left on device", "['latest', 'step-1', 'step-2'] 2"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_while_saving():
    """The full hundred kills at random times: docs/reliability.md."""
    command = [sys.executable, "tests/faults/kill_checkpoints.py", "--kills", "25"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), text=True, capture_output=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["points"] >= 40
    assert figures["inside_a_save"] > 0
