"""Train: `deepspeed fastcorl/train.py --config FILE [--section.key value ...]`, or torchrun, or plain python."""

import sys
from pathlib import Path

if not __package__:
    # Run as a file, Python puts fastcorl/ itself first on the path; a clone need not be installed.
    _repository = Path(__file__).resolve().parent.parent
    sys.path[0:1] = [str(_repository), str(_repository / "kernels")]

from fastcorl.config_loading import read_command_line
from fastcorl.errors import main_guard
from fastcorl.first_checks import check_first


@main_guard()
def main() -> None:
    config, dry_run = read_command_line(sys.argv[1:])
    # Torch takes seconds to import, and a mistake should show at once.
    if dry_run:
        from fastcorl.dry_run import describe_run as run
    else:
        check_first(config)
        from fastcorl.pipeline import train as run

    run(config)


if __name__ == "__main__":
    main()
