"""`fastcorl export-drawings`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastcorl.benchmark_prompts import read_tasks
from fastcorl.commands.shared import check_counts, load, make_params, writable_folder
from fastcorl.errors import UserError
from fastcorl.places import check_janus


@dataclass
class ExportDrawings:
    """Draw the prompts of GenEval, DPG-Bench or WISE into the folders that their scorers read (docs/benchmarks.md)."""

    layout: Literal["geneval", "dpg", "wise"]
    """Whose folders."""
    prompts: list[Path]
    """evaluation_metadata.jsonl of GenEval, the folder dpg_bench/prompts, or JSON files of WISE."""
    out: Path
    """Folder for the pictures. Those that are there already are kept, so a stopped export goes on."""
    model: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format."""
    samples: int | None = None
    """Pictures per prompt; None is the benchmark's own number: 4, 4 and 1."""
    seed: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    guidance: float = 5.0
    """Classifier-free guidance; the paper and Janus-Pro are scored with 5."""
    drawings_at_once: int = 64
    """Pictures sampled together."""
    part: str = "0/1"
    """i/n draws every n-th prompt from the i-th on: one process per GPU, all with the same --out."""
    device: str = "auto"

    def run(self) -> None:
        part = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if part is None:
            raise UserError(f"--part {self.part}: must be i/n, as 0/8")
        check_counts(self, "drawings_at_once", "samples")
        read_tasks(self.layout, self.prompts)
        check_janus(self.model, "--model")

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        from fastcorl.exports import export_drawings
        from fastcorl.rollout import RolloutEngine

        params = make_params(self.temperature, guidance=self.guidance)
        writable_folder("--out", self.out)
        engine = RolloutEngine(load(self.model, self.device), weight_version=0)
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("drawing", total=None)
            exported = export_drawings(
                engine,
                self.layout,
                self.prompts,
                self.out,
                params,
                samples=self.samples,
                seed=self.seed,
                drawings_at_once=self.drawings_at_once,
                part=(int(part[1]), int(part[2])),
                progress=lambda drawn, total: bar.update(task, completed=drawn, total=total),
            )
        side = exported.side
        print(f"{self.out}: {exported.drawn} pictures drawn, {exported.kept} kept; a sample is {side} x {side} pixels")
