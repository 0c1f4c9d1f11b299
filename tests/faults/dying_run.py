"""The trainer with a rank that dies by SIGKILL: `dying_run.py PHASE STEP OPTION ..`, the options being train.py's.

PHASE is one of PHASES; STEP counts from 1 how often the second rank has come to it.
"""

import os
import signal
import sys

from fastcorl import train
from fastcorl.experience import Collector
from fastcorl.pipeline import Run
from fastcorl.runtime.checkpoints import Checkpoints
from fastcorl.trainer import Trainer

# The function in whose middle, or at whose start, the rank dies.
PHASES = {
    "evaluation": (Run, "_evaluate"),
    "rollout": (Collector, "_sample"),
    "score": (Collector, "_finish"),
    "train": (Trainer, "_update"),
    "save": (Checkpoints, "save"),
}


def die_in(phase: str, step: int) -> None:
    owner, name = PHASES[phase]
    real, count = getattr(owner, name), 0

    def die() -> None:
        print("the second rank dies", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def call(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == step and os.environ["RANK"] == "1":
            if phase != "save":
                die()
            position, write, *rest = arguments
            arguments = (position, lambda folder: (write(folder), die()), *rest)
        return real(self, *arguments, **options)

    setattr(owner, name, call)


if __name__ == "__main__":
    phase, step, *options = sys.argv[1:]
    if phase in PHASES:
        die_in(phase, int(step))
    sys.argv[1:] = options
    train.main()
