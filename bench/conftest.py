"""Which machine and which versions the numbers belong to, and one table of ratios at the end."""

import platform
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from bench.summary import entries_in, ratio_table

ENTRIES = pytest.StashKey[list]()
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


@pytest.fixture(autouse=True)
def _entries_are_kept(request):
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is not None:
        request.config.stash.setdefault(ENTRIES, []).extend(entries_in(benchmark.extra_info))


def pytest_terminal_summary(terminalreporter, config):
    entries = config.stash.get(ENTRIES, [])
    if entries:
        terminalreporter.section("ratios")
        for line in ratio_table(entries):
            terminalreporter.write_line(line)
