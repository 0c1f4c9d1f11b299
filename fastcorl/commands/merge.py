"""`fastcorl merge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastcorl.commands.shared import load
from fastcorl.errors import UserError


@dataclass
class Merge:
    """Join refined models around the model all of them started from."""

    base: str
    """The model they were trained from."""
    models: list[str]
    """The refined models: two, or more for the methods linear and ties."""
    out: Path
    """Folder for the merged model."""
    method: Literal["gaussian", "linear", "ties"] = "gaussian"
    """Gaussian (arXiv 2501.10661, the paper's), the mean, or TIES (arXiv 2306.01708)."""
    density: float = 0.2
    """For ties: fraction of each update's entries that is kept."""

    def run(self) -> None:
        from fastcorl.algorithm import merge_state_dicts
        from fastcorl.model import save_policy

        if len(self.models) < 2 or (self.method == "gaussian" and len(self.models) > 2):
            wanted = "two models" if self.method == "gaussian" else "at least two models"
            raise UserError(f"--models: {self.method} takes {wanted}, got {len(self.models)}")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be over 0 and at most 1")
        policy = load(self.base, "cpu")
        states = [policy.janus.state_dict(), *(load(path, "cpu").janus.state_dict() for path in self.models)]
        try:
            merged = merge_state_dicts(*states, method=self.method, density=self.density)
        except ValueError as error:
            raise UserError(f"--models: {error}") from error
        policy.janus.load_state_dict(merged)
        save_policy(policy, self.out)
        print(f"merged model: {self.out}")
