"""`fastcorl report`."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from fastcorl.commands.shared import writable_folder
from fastcorl.errors import UserError


@dataclass
class Report:
    """Draw a run, or compare several: report.png, and report.html with all there is to see in one file."""

    runs: tyro.conf.Positional[list[Path]] = field(default_factory=list)
    """Folders of runs, as runs/quickstart; finished or still going."""
    out: Path | None = None
    """Folder for the two files; None is the run's own folder, and `report` for several runs."""

    def run(self) -> None:
        if not self.runs:
            raise UserError("report: name the folder of a run, as in fastcorl report runs/quickstart")
        for run in self.runs:
            if not run.is_dir():
                raise UserError(f"report: {run}: no such folder; name that of a run, as runs/quickstart")
        folders = [folder.resolve() for folder in self.runs]
        if len(set(folders)) < len(folders):
            raise UserError("report: name each run once")

        from fastcorl.runtime.report import draw_comparison, draw_report, read_run
        from fastcorl.runtime.report_page import write_page

        names = [folder.name for folder in folders]
        labels = [name if names.count(name) == 1 else str(given) for name, given in zip(names, self.runs, strict=True)]
        results = [read_run(folder, label) for folder, label in zip(self.runs, labels, strict=True)]
        several = len(results) > 1
        out = self.out or (Path("report") if several else self.runs[0])
        writable_folder("--out", out)
        picture = out / "report.png"
        try:
            draw_comparison(results, picture) if several else draw_report(self.runs[0], picture)
            page = write_page(results, out / "report.html")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from error
        print(f"{page}, {picture}")
