"""Checkpoints of a run: `step-N/` with a manifest of what is in it, whole or not there at all.

All ranks write into `tmp-N`; the files are synced, the manifest follows, and one rename makes it `step-N`.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastcorl.errors import UserError
from fastcorl.runtime.durable import put_in_place, remove_folder, sync, sync_tree, write_text

MANIFEST = "manifest.json"
POSITION = "position.json"
LATEST = "latest"


@dataclass(frozen=True)
class Position:
    """Where a run is: `step` steps of `stage` are done, `global_step` over all stages."""

    stage: str
    step: int
    global_step: int
    world_size: int
    engine: str  # "plain" or "deepspeed"
    zero_stage: int
    lora: str = "none"


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    folder: Path
    position: Position
    config_hash: str


class Checkpoints:
    """The folder of a run's checkpoints. `config_hash` identifies the configuration that they are written under."""

    def __init__(self, folder: Path, config_hash: str):
        self.folder, self.config_hash = folder, config_hash

    def steps(self) -> list[Path]:
        """All that are in place, the oldest first."""
        whole = (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())
        return sorted(whole, key=step_of)

    def find(self, resume: str | None) -> tuple[Found | None, list[str]]:
        """The checkpoint to continue from, and a line on each that is bad: `resume` names a folder, or is "auto" for
        the newest whole one. One that was named and is bad is an error."""
        if resume is None:
            return None, []
        if resume != "auto":
            folder = Path(resume)
            if problem := problem_of(folder):
                raise UserError(f"resume: {resume!r} is not a whole checkpoint: {problem}")
            return _read(folder), []
        lines = []
        for folder in reversed(self.steps()):
            problem = problem_of(folder)
            if problem is None:
                return _read(folder), lines
            lines.append(f"checkpoint {folder} is not used: {problem}")
        return None, lines

    def save(
        self,
        position: Position,
        write: Callable[[Path], None],
        gather: Callable[[Any], list[Any]],
        *,
        main: bool,
        keep: int | None,
    ) -> str | None:
        """A collective call: `write` writes this rank's files, `gather` gives every rank what each of them says.

        Returns None, or in words what went wrong; nothing is left of the attempt then, and older checkpoints are as
        they were. Of these the newest `keep` stay, this one counted, or all for None.
        """
        final = self.folder / f"step-{position.global_step}"
        temporary = self.folder / f"tmp-{position.global_step}"

        def by_main(action: Callable, *arguments: Any) -> Callable[[], Any]:
            return lambda: action(*arguments) if main else None

        def attempt(action: Callable[[], Any]) -> str | None:
            error = None
            try:
                action()
            except (OSError, RuntimeError) as caught:
                error = " ".join(str(caught).split()) or type(caught).__name__
            return next((told for told in gather(error) if told), None)

        if gather(main and self._is_there(final, position))[0]:
            return None
        for action in (
            by_main(_make_empty, temporary),
            lambda: write(temporary),
            lambda: sync_tree(temporary),  # on every node, whose own caches hold what its ranks wrote
            by_main(self._complete, temporary, final, position),
            by_main(self._make_latest, final, keep),
        ):
            if problem := attempt(action):
                if main:
                    shutil.rmtree(temporary, ignore_errors=True)
                return problem
        return None

    def point_at_newest(self) -> None:
        """Correct the file `latest` after checkpoints were moved away."""
        steps = self.steps()
        if steps:
            write_text(self.folder / LATEST, steps[-1].name + "\n")
        else:
            (self.folder / LATEST).unlink(missing_ok=True)

    def _is_there(self, folder: Path, position: Position) -> bool:
        """Whether a whole checkpoint of this state is in place; the same step of the same run is the same state."""
        if not folder.exists() or problem_of(folder) is not None:
            return False
        found = _read(folder)
        return found.position == position and found.config_hash == self.config_hash

    def _complete(self, temporary: Path, final: Path, position: Position) -> None:
        write_text(temporary / POSITION, json.dumps(asdict(position), indent=1))
        manifest = {
            "files": _describe(temporary),
            "config": self.config_hash,
            "world_size": position.world_size,
            "versions": {"python": platform.python_version(), **package_versions()},
        }
        manifest["sha256"] = hash_of(manifest)
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
        sync(temporary)
        if final.exists():  # and is bad, or another run's
            remove_folder(final)
        put_in_place(temporary, final)

    def _make_latest(self, final: Path, keep: int | None) -> None:
        write_text(self.folder / LATEST, final.name + "\n")
        if keep is not None:
            # `final` was just read back for its manifest: it stays whatever else is here, and whatever its number.
            others = [folder for folder in self.steps() if folder != final]
            for old in others[: 1 - keep or None]:
                remove_folder(old)


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, its files held against its manifest; None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, stated = manifest["files"], manifest.pop("sha256")
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if stated != hash_of(manifest):
        return f"{MANIFEST} is not as it was written"
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {file['size']}"
    try:
        there = _describe(folder)
    except OSError as error:
        return f"it cannot be read: {error}"
    for name, file in there.items():
        if name != MANIFEST and name not in files:
            return f"{name} is not in its {MANIFEST}"
        if name != MANIFEST and file != files[name]:
            return f"{name} is not as it was written (sha256)"
    return None


def hash_of(value: Any) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> Found:
    position = Position(**json.loads((folder / POSITION).read_text(encoding="utf-8")))
    return Found(folder, position, json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["config"])


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, paths))
    return {
        path.relative_to(folder).as_posix(): {"sha256": digest, "size": path.stat().st_size}
        for path, digest in zip(paths, hashes, strict=True)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_versions() -> dict[str, str]:
    found = {}
    for package in ("fastcorl", "torch", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
