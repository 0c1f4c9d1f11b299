"""Which machine and which versions the numbers belong to."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "transformers", "triton", "liger-kernel", "trl", "nvidia-cutlass-dsl", "pytest-benchmark")


def pytest_benchmark_generate_machine_info(config):
    """In place of pytest-benchmark's own, which names the host."""
    from cpuinfo import get_cpu_info  # as pytest-benchmark does

    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": get_cpu_info().get("brand_raw", platform.machine()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
