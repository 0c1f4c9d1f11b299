"""`python -m fastcorl.doctor`: as `fastcorl doctor`, where the command is not installed."""

import sys

from fastcorl.cli import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
