"""The folder of a run: `runs/<name>/` with its checkpoints and exports, each put in place in one rename.

config.yaml  metrics.jsonl  scores.json  tensorboard/  samples/  checkpoints/step-N/  export/<stage>/  report.png
"""

import os
import shutil
import socket
from pathlib import Path
from typing import IO

import yaml

from fastcorl.config import Config
from fastcorl.errors import UserError
from fastcorl.runtime.checkpoints import Checkpoints, hash_of, step_of
from fastcorl.runtime.durable import remove_temporary, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "lock"


class RunFolder:
    """Call `prepare` and `abandon_after` on the main rank only."""

    def __init__(self, config: Config):
        self.path = Path(config.output_dir) / config.name
        self.checkpoints = Checkpoints(self.path / "checkpoints", hash_of(_what_counts(config)))
        self._lock: IO[str] | None = None

    def prepare(self, config: Config, *, resume: bool) -> str | None:
        """Make the folder and write config.yaml; remove what a killed run left half done. A former run of the same
        name is moved aside, not overwritten; UserError where that run is not over.

        Returns a note for the user, if there is something to say.
        """
        note = None
        if self.path.exists():
            self._hold()
            if not resume:
                self.release()
                number = 1
                while (aside := self.path.with_name(f"{self.path.name}-{number}")).exists():
                    number += 1
                self.path.rename(aside)
                note = f"{self.path} was there already: moved to {aside} (--resume auto continues a run)"
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        for folder in (self.path, self.checkpoints.folder, self.path / "export"):
            remove_temporary(folder)
        write_text(self.path / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False))
        return note

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock = None

    def _hold(self) -> None:
        """Keep the folder from other processes until `release`, or the end of this one; UserError where one has it.

        Where files cannot be locked, as on some network file systems, nothing is kept from anybody.
        """
        if self._lock is not None or fcntl is None:
            return
        lock = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{self.path}: a run is writing to it ({lock.read().strip()}): end that one, or give this one another "
                "--name"
            ) from None
        except OSError:
            lock.close()
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def export(self, stage: str) -> Path:
        return self.path / "export" / stage

    def abandon_after(self, global_step: int, stages: list[str]) -> None:
        """Move aside what a run going back to `global_step` leaves behind: later checkpoints, exports of `stages`."""
        later = [folder for folder in self.checkpoints.steps() if step_of(folder) > global_step]
        for folder in [*later, *(self.export(stage) for stage in stages if self.export(stage).exists())]:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if later:
            self.checkpoints.point_at_newest()


def _what_counts(config: Config) -> dict:
    """The configuration without what may differ between the parts of one run."""
    aside = ("resume", "output_dir", "name", "threads")
    return {key: value for key, value in config.dump().items() if key not in aside}
