"""The folder of a run: `runs/<name>/` with its checkpoints and exports, each put in place in one rename.

config.yaml  metrics.jsonl  scores.json  tensorboard/  samples/  checkpoints/step-N/  export/<stage>/  report.png
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from fastcorl.config import Config
from fastcorl.errors import UserError

MANIFEST = "manifest.json"


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


class RunFolder:
    """Rank-aware: call `prepare` on the main rank only; `save` on all ranks, with a barrier."""

    def __init__(self, config: Config):
        self.path = Path(config.output_dir) / config.name
        self.checkpoints = self.path / "checkpoints"

    def prepare(self, config: Config, *, resume: bool) -> str | None:
        """Make the folder and write config.yaml. A former run of the same name is moved aside, not overwritten.

        Returns a note for the user, if there is something to say.
        """
        note = None
        if self.path.exists() and not resume:
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}-{number}")).exists():
                number += 1
            self.path.rename(aside)
            note = f"{self.path} was there already: moved to {aside} (--resume auto continues a run)"
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False))
        return note

    def export(self, stage: str) -> Path:
        return self.path / "export" / stage

    def resume_from(self, resume: str | None) -> tuple[Path, Position] | None:
        """The checkpoint to continue from: the named folder, or the newest complete one for "auto"."""
        if resume is None:
            return None
        if resume != "auto":
            folder = Path(resume)
            if not (folder / MANIFEST).is_file():
                raise UserError(f"resume: {resume!r} is not a complete checkpoint (no {MANIFEST})")
            return folder, read_position(folder)
        complete = [folder for folder in self._steps() if (folder / MANIFEST).is_file()]
        return (complete[-1], read_position(complete[-1])) if complete else None

    def abandon_after(self, global_step: int, stages: list[str]) -> None:
        """Move aside what a run going back to `global_step` leaves behind: later checkpoints, exports of `stages`."""
        later = [folder for folder in self._steps() if int(folder.name.split("-")[1]) > global_step]
        for folder in [*later, *(self.export(stage) for stage in stages if self.export(stage).exists())]:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)

    def _steps(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))

    def save(
        self, position: Position, write: Callable[[Path], None], barrier: Callable[[], None], *, main: bool, keep: int
    ) -> None:
        """All ranks write into one temporary folder; the main one adds the manifest and renames it into place."""
        final = self.checkpoints / f"step-{position.global_step}"
        temporary = self.checkpoints / f"tmp-{position.global_step}"
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        write(temporary)
        barrier()
        if main:
            write_text(temporary / "position.json", json.dumps(asdict(position), indent=1))
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(temporary)): _sha256(path) for path in files}
            write_text(temporary / MANIFEST, json.dumps(hashes, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in self._steps()[:-keep]:
                shutil.rmtree(old)
        barrier()


def read_position(folder: Path) -> Position:
    return Position(**json.loads((folder / "position.json").read_text()))


@contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error."""
    temporary = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
