"""What the machine offers, by libraries that may crash or hang with it: GPU, CUDA, NVML, Java, the hub."""

import importlib.util
import os
import re
import subprocess
import threading
from pathlib import Path

from fastcorl.system_checks.findings import Outcome, first_line

DRIVER = Path("/proc/driver/nvidia/version")
COMMAND_SECONDS = 15
HUB_SECONDS = 3
OLDEST_JAVA = 8


def try_gpu() -> Outcome:
    """That torch computes on every GPU there is."""
    import torch

    if torch.cuda.is_available():
        shown = []
        for index in range(torch.cuda.device_count()):
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if (ones @ ones).sum().item() != 64**3:
                raise RuntimeError(f"a product on GPU {index} is wrong")
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            shown.append(f"{device.name} ({memory}, compute capability {device.major}.{device.minor})")
        return "ok", "; ".join([*shown, *driver_version()])
    if not has_nvidia_driver():
        return "n/a", "none; training runs on the CPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return "n/a", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}; training runs on the CPU"
    if torch.version.cuda is None:
        raise RuntimeError(f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA")
    torch.cuda.init()  # raises with the reason
    raise RuntimeError("there is an NVIDIA driver, but torch sees no GPU")


def has_nvidia_driver() -> bool:
    """Whether Linux has one loaded, or Windows lends its own."""
    return DRIVER.exists() or Path("/dev/dxg").exists()


def driver_version() -> list[str]:
    """As Linux's NVIDIA driver tells it, where there is one."""
    found = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER.read_text()) if DRIVER.exists() else None
    return [f"driver {found[1]}"] if found else []


def try_cuda() -> Outcome:
    """That nvcc, where there is one, has the major version that torch is built for: DeepSpeed compiles operators with
    it, and needs no more than that."""
    import torch

    ours = torch.version.cuda
    if ours is None:
        return "n/a", "torch is built without CUDA"
    from torch.utils.cpp_extension import CUDA_HOME

    compiler = None if CUDA_HOME is None else Path(CUDA_HOME, "bin", "nvcc")
    if compiler is None or not compiler.exists():
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if named:
            return "problem", f"CUDA_HOME is {named}, which has no bin/nvcc", "correct or unset it"
        detail = f"torch is for CUDA {ours}; no nvcc, which only operators that DeepSpeed compiles would need"
        return "n/a", detail
    found = re.search(r"release (\d+)\.(\d+)", _output([str(compiler), "--version"]))
    if found is None:
        raise RuntimeError(f"{compiler} --version tells no version")
    both = f"torch is for CUDA {ours}, {compiler} for {found[1]}.{found[2]}"
    major = ours.split(".")[0]
    if major != found[1]:
        remedy = f"set CUDA_HOME to a toolkit of CUDA {major}; only operators that DeepSpeed compiles need it"
        return "problem", f"{both}: another major version", remedy
    return "ok", f"{both}: the same major version"


def try_nvml() -> Outcome:
    """The driver and its GPUs by NVML, which tells power and energy."""
    if importlib.util.find_spec("pynvml") is None:
        return "n/a", "nvidia-ml-py is not installed; power and energy stay unknown"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if has_nvidia_driver():
            raise
        return "n/a", f"no NVIDIA driver ({error}); power and energy stay unknown"
    driver, count = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount()
    pynvml.nvmlShutdown()
    return "ok", f"driver {driver}, {count} GPU{'' if count == 1 else 's'}"


def try_java() -> Outcome:
    """Java, and what else SPICE needs of it."""
    from fastcorl.errors import UserError
    from fastcorl.rewards.captions.spice import find_jars, find_java

    try:
        java = find_java()
    except UserError as error:
        if os.environ.get("JAVA_HOME"):
            remedy = "set JAVA_HOME to a JDK, or unset it"
            return "problem", f"JAVA_HOME is {os.environ['JAVA_HOME']}, which has no bin/java", remedy
        return "n/a", _reason(error)
    found = re.search(r'version "(?:1\.)?(\d+)[^"]*"', _output([java, "-version"]))
    if found is None:
        raise RuntimeError(f"{java} -version tells no version")
    version = found[0].removeprefix("version ").strip('"')
    if int(found[1]) < OLDEST_JAVA:
        return "problem", f"{version} is too old for SPICE", f"install a JDK, {OLDEST_JAVA} or later"
    try:
        find_java("javac")
        find_jars()
    except UserError as error:
        return "n/a", f"{version}, but not all that SPICE needs: {_reason(error)}"
    return "ok", f"{version}, with all that SPICE needs"


def _reason(error: Exception) -> str:
    return str(error).partition("spice: ")[2] or str(error)


def try_hub() -> Outcome:
    """Whether the Hugging Face hub answers; training from local files needs no hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "n/a", "HF_HUB_OFFLINE is set; local files alone"
    said: list[str] = []

    def ask() -> None:
        try:
            # Any answer will do, and the client's session knows proxies and certificates.
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            said.append("answers")
        except Exception as error:  # the HTTP clients that the hub's has had share no base
            said.append(f"does not answer ({first_line(error)})")

    # Looking up a name has no timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    answer = said[0] if said else f"does not answer within {HUB_SECONDS} s"
    if answer == "answers":
        return "ok", f"{constants.ENDPOINT} answers"
    return "n/a", f"{constants.ENDPOINT} {answer}; local files alone"


def _output(command: list[str]) -> str:
    """Both streams of a command: Java tells its version on standard error."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS)
    return result.stdout + result.stderr
