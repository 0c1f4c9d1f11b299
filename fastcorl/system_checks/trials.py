"""What may crash or hang: `python -m fastcorl.system_checks.trials NAME ...` tries it in that process.

What a trial finds is a line of JSON on standard output, written as soon as it is done, so that whoever started
the process (`runner.py`) knows in which trial it has ended.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fastcorl.system_checks import library_trials, machine_trials
from fastcorl.system_checks.findings import Finding, Outcome, first_line


@dataclass(frozen=True)
class Trial:
    """`run` gives a status, a detail and maybe a remedy, or raises where something does not work. `remedy` is for that,
    and for an end of the process."""

    run: Callable[[], Outcome]
    remedy: str
    needed: bool = False


def _attention(name: str, remedy: str = "leave model.attention at auto, which takes what works") -> Trial:
    return Trial(library_trials.attention_trial(name), remedy)


TRIALS: dict[str, Trial] = {
    "torch": Trial(library_trials.try_torch, "reinstall torch", needed=True),
    "GPU": Trial(machine_trials.try_gpu, "install the build of torch that the driver and the GPU need", needed=True),
    "CUDA": Trial(machine_trials.try_cuda, "set CUDA_HOME to a toolkit with a working nvcc, or unset it"),
    "deepspeed": Trial(library_trials.try_deepspeed, "reinstall deepspeed, or uninstall it", needed=True),
    "kernels torch": Trial(library_trials.try_torch_kernels, "run pip install -e . in the clone", needed=True),
    "kernels triton": Trial(library_trials.try_triton_kernels, "install the triton of this torch", needed=True),
    "transformers": Trial(library_trials.try_transformers, "reinstall transformers, and what it names", needed=True),
    "Liger": Trial(library_trials.try_liger, "reinstall liger-kernel, or leave model.liger at auto"),
    "attention flash_attn": _attention(
        "flash_attn", "rebuild it for this torch: pip install --no-build-isolation --no-binary flash-attn flash-attn"
    ),
    "attention xformers": _attention("xformers", "reinstall the xformers that is built for this torch"),
    "attention torch": _attention("torch"),
    "attention flex": _attention("flex"),
    "attention sdpa": _attention("sdpa"),
    "attention auto": Trial(library_trials.attention_trial("auto"), "set model.attention to sdpa", needed=True),
    "Java": Trial(machine_trials.try_java, "reinstall the JDK, or take spice_py for SPICE"),
    "NVML": Trial(machine_trials.try_nvml, "reinstall the driver, or uninstall nvidia-ml-py"),
    "hub": Trial(machine_trials.try_hub, "use local files"),
}

# What one process tries in turn, so that torch and transformers are imported once each. The first of them must work for
# the others to be tried.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("hub",),
    ("NVML",),
    (
        "transformers",
        "attention sdpa",
        "attention auto",
        "Liger",
        "Java",
        "attention torch",
        "attention flash_attn",
        "attention xformers",
        "attention flex",
    ),
    ("torch", "GPU", "CUDA", "kernels torch", "kernels triton", "deepspeed"),
)


def attempt(name: str) -> Finding:
    """What one trial finds, whatever it raises."""
    trial = TRIALS[name]
    try:
        return Finding(name, *trial.run())
    except Exception as error:  # what libraries raise when they are broken has no common base
        return Finding(name, "problem", first_line(error), trial.remedy, trial.needed)


def main() -> None:
    # Libraries print to standard output when they are imported, and their children inherit it.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        print(json.dumps(asdict(attempt(name))), file=report, flush=True)


if __name__ == "__main__":
    main()
