"""Which machine and which versions the numbers belong to, one table of ratios at the end, and what a run that is cut
leaves behind."""

import json
import platform
from datetime import UTC, datetime
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
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@pytest.fixture(scope="session")
def _machine(request):
    return pytest_benchmark_generate_machine_info(request.config)


@pytest.fixture(autouse=True)
def _entries_are_kept(request, _machine):
    """pytest-benchmark writes its file when all have run; until then there is one beside it, for bench.summary."""
    config, arguments = request.config, request.node.funcargs
    yield
    benchmark = arguments.get("benchmark")
    if benchmark is None:
        return
    entries = config.stash.setdefault(ENTRIES, [])
    entries += entries_in(benchmark.extra_info)
    if config.option.benchmark_json is not None:
        so_far = {"extra_info": {"entries": entries}}
        result = {"datetime": datetime.now(UTC).isoformat(), "machine_info": _machine, "benchmarks": [so_far]}
        _unfinished(config).write_text(json.dumps(result))


def _unfinished(config):
    return config.option.benchmark_json.with_suffix(".unfinished.json")


def pytest_unconfigure(config):
    whole = config.option.benchmark_json
    if whole is not None and whole.exists():
        _unfinished(config).unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter, config):
    entries = config.stash.get(ENTRIES, [])
    if entries:
        terminalreporter.section("ratios")
        for line in ratio_table(entries):
            terminalreporter.write_line(line)
