"""`fastcorl merge`."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastcorl.errors import UserError
from fastcorl.places import check_janus, check_new_folder


@dataclass
class Merge:
    """Join refined models around the model all of them started from, in the type of its weights."""

    base: str
    """The model they were trained from."""
    models: list[str]
    """The refined models: two, or more for the methods linear and ties."""
    out: Path
    """New folder for the merged model."""
    method: Literal["gaussian", "linear", "ties"] = "gaussian"
    """Gaussian (arXiv 2501.10661, the paper's), the mean, or TIES (arXiv 2306.01708)."""
    density: float | None = None
    """For ties: fraction of each update's entries that is kept, 0.2 unless given."""

    def run(self) -> None:
        if len(self.models) < 2 or (self.method == "gaussian" and len(self.models) > 2):
            wanted = "two models" if self.method == "gaussian" else "at least two models"
            raise UserError(f"--models: {self.method} takes {wanted}, got {len(self.models)}")
        if self.density is not None and self.method != "ties":
            raise UserError(f"--density is for --method ties, not {self.method}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be over 0 and at most 1")
        check_new_folder(self.out, f"--out {self.out}")
        check_janus(self.base, "--base")
        for name in self.models:
            check_janus(name, "--models")

        from fastcorl.algorithm import merge_state_dicts
        from fastcorl.model.weight_files import new_folder, open_weights, write_weights
        from fastcorl.runtime.card_parts import CARD
        from fastcorl.runtime.model_card import merge_card

        base = _folder("--base", self.base)
        tuned = [_folder("--models", name) for name in self.models]
        density = 0.2 if self.density is None else self.density
        try:
            with new_folder(self.out) as folder:
                try:
                    merged = merge_state_dicts(
                        *(open_weights(each) for each in (base, *tuned)),
                        method=self.method,
                        density=density,
                    )
                except ValueError as error:
                    raise UserError(f"--models: {error}") from error
                write_weights(folder, merged)
                for file in base.iterdir():
                    weights = ".safetensors" in file.name or ".bin" in file.name
                    if file.is_file() and not weights and file.name != CARD:  # which is of the base
                        shutil.copy(file, folder)
                kept = density if self.method == "ties" else None
                card = merge_card(self.base, self.models, self.out, self.method, kept)
                (folder / CARD).write_text(card, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written: {error.strerror}") from error
        print(f"merged model: {self.out}")


def _folder(flag: str, name: str) -> Path:
    """The checkpoint that `flag` names, if it is a Janus in the transformers format."""
    from fastcorl.model.convert import checkpoint_folder
    from fastcorl.model.loading import resolve

    try:
        resolve(name)
        return checkpoint_folder(name)
    except UserError as error:
        raise UserError(str(error).replace("model.path", flag).replace("--from", flag)) from error
