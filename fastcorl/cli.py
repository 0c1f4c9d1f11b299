"""The `fastcorl` command. Each of its commands has --help."""

import sys
from typing import Annotated

import tyro

from fastcorl.commands.ask import Ask
from fastcorl.commands.doctor import Doctor
from fastcorl.commands.evaluate import Evaluate
from fastcorl.commands.export import Export
from fastcorl.commands.export_drawings import ExportDrawings
from fastcorl.commands.generate import Generate
from fastcorl.commands.merge import Merge
from fastcorl.commands.push import Push
from fastcorl.commands.report import Report
from fastcorl.errors import flag_mistakes, main_guard


@main_guard()
def main(argv: list[str] | None = None) -> None:
    with flag_mistakes():
        command = tyro.cli(
            Annotated[Generate, tyro.conf.subcommand("generate")]
            | Annotated[Ask, tyro.conf.subcommand("ask")]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[ExportDrawings, tyro.conf.subcommand("export-drawings")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Merge, tyro.conf.subcommand("merge")]
            | Annotated[Export, tyro.conf.subcommand("export")]
            | Annotated[Push, tyro.conf.subcommand("push")]
            | Annotated[Doctor, tyro.conf.subcommand("doctor")],
            prog="fastcorl",
            args=sys.argv[1:] if argv is None else argv,
        )
    command.run()


if __name__ == "__main__":
    main()
