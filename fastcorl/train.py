"""Train: `deepspeed fastcorl/train.py --config FILE [--section.key value ...]`, or torchrun, or plain python."""

import sys
from pathlib import Path

if not __package__:
    # Run as a file, Python puts fastcorl/ itself first on the path; a clone need not be installed.
    _repository = Path(__file__).resolve().parent.parent
    sys.path[0:1] = [str(_repository), str(_repository / "kernels")]

from fastcorl.config_loading import load_config
from fastcorl.errors import main_guard


@main_guard()
def main() -> None:
    config = load_config(sys.argv[1:])
    # Only now, because torch takes seconds to import and a mistake should show at once.
    from fastcorl.pipeline import train

    train(config)


if __name__ == "__main__":
    main()
