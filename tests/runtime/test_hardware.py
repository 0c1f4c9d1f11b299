"""Peaks, NVML and the allocator, against a stand-in `pynvml` that answers as the real one does."""

import math
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.hardware import (
    HardwareMeter,
    PowerMeter,
    Reading,
    device_peak,
    hardware_note,
    hardware_record,
    peak_flops,
)

UUID = "ffc79498-8ff3-c2dc-3b0d-fafd804516ae"  # as torch prints it
FIRST, SECOND = f"GPU-{UUID}", "GPU-00000000-0000-0000-0000-000000000001"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class Gpu:
    """A GPU that draws `watts` all the time; names in `lacks` are what it does not support."""

    watts: float = 250.0
    busy: int = 80
    lacks: set[str] = field(default_factory=set)
    counted_from: float = field(default_factory=time.perf_counter)


def stand_in(gpus: dict[str, Gpu], *, driver: bool = True) -> ModuleType:
    """`pynvml` with these GPUs by UUID. Names, arguments, units and errors are those of nvidia-ml-py 13."""
    module = ModuleType("pynvml")
    module.open = 0

    class NVMLError(Exception):
        pass

    class NotSupported(NVMLError):
        pass

    class NotFound(NVMLError):
        pass

    class LibraryNotFound(NVMLError):
        pass

    def nvmlInit() -> None:
        if not driver:
            raise LibraryNotFound("NVML Shared Library Not Found")
        module.open += 1

    def nvmlShutdown() -> None:
        module.open -= 1

    def nvmlDeviceGetHandleByUUID(uuid: str) -> Gpu:
        if uuid not in gpus:
            raise NotFound("Not Found")
        return gpus[uuid]

    def query(name: str, answer):
        def ask(handle: Gpu):
            if not module.open:
                raise NVMLError("Uninitialized")
            if name in handle.lacks:
                raise NotSupported("Not Supported")
            return answer(handle)

        setattr(module, name, ask)

    query(
        "nvmlDeviceGetTotalEnergyConsumption",
        lambda gpu: int(1e9 + 1000 * gpu.watts * (time.perf_counter() - gpu.counted_from)),
    )
    query("nvmlDeviceGetPowerUsage", lambda gpu: int(1000 * gpu.watts))
    query("nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=gpu.busy, memory=gpu.busy // 2))
    query("nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(total=80 * 2**30, free=60 * 2**30, used=20 * 2**30))
    for function in (nvmlInit, nvmlShutdown, nvmlDeviceGetHandleByUUID):
        setattr(module, function.__name__, function)
    module.NVMLError, module.NVMLError_NotSupported = NVMLError, NotSupported
    module.NVMLError_NotFound, module.NVMLError_LibraryNotFound = NotFound, LibraryNotFound
    return module


@pytest.fixture
def install(monkeypatch):
    """Make `import pynvml` find a module; None: there is none."""

    def put(module: ModuleType | None) -> ModuleType | None:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return put


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("A100-PCIE-40GB", torch.float16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA L40S", torch.float16, 362.05),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71),
        ("NVIDIA B200", torch.bfloat16, 2250),
        # Others than their namesakes, and unknown.
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA A100-SXM-64GB", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("AMD Instinct MI300X", torch.bfloat16, None),
        ("AMD EPYC 9B14", torch.float32, None),
        ("NVIDIA H200", torch.float64, None),
    ],
)
def test_peaks(name, dtype, tflops):
    assert peak_flops(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_float32_has_two_peaks(monkeypatch):
    assert peak_flops("NVIDIA H200", torch.float32, tf32=True) == pytest.approx(494.7e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    for precision, tflops in (("ieee", 19.5), ("tf32", 156)):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        assert device_peak(CUDA, torch.float32) == pytest.approx(tflops * 1e12)
    assert device_peak(CPU, torch.float32) is None


def test_energy_from_the_counter(install):
    module = install(stand_in({FIRST: Gpu(watts=250)}))
    meter = PowerMeter(UUID, sample_seconds=0.01)
    time.sleep(0.05)
    meter.begin()  # what was used before is another step's
    begun = time.perf_counter()
    time.sleep(0.1)
    joules, watts, busy, used = meter.read()
    seconds = time.perf_counter() - begun
    assert joules == pytest.approx(250 * seconds, rel=0.1)
    assert watts == pytest.approx(250, rel=0.1)
    assert (busy, used) == (pytest.approx(0.8), 20)
    assert module.open == 1
    meter.close()
    assert module.open == 0
    assert all(math.isnan(value) for value in meter.read())


def test_energy_from_sampled_power_where_there_is_no_counter(install):
    gpu = Gpu(watts=100, lacks={"nvmlDeviceGetTotalEnergyConsumption"})
    install(stand_in({FIRST: gpu}))
    meter = PowerMeter(UUID, sample_seconds=0.005)
    meter.begin()
    begun = time.perf_counter()
    time.sleep(0.15)
    gpu.watts, gpu.busy = 300, 20  # a second half of the step that takes more and does less
    time.sleep(0.15)
    joules, watts, busy, _ = meter.read()
    meter.close()
    assert joules == pytest.approx(watts * (time.perf_counter() - begun), rel=0.1)
    assert 150 < watts < 250 and 0.35 < busy < 0.65


def test_a_step_shorter_than_the_time_between_samples(install):
    install(stand_in({FIRST: Gpu(watts=100, busy=40, lacks={"nvmlDeviceGetTotalEnergyConsumption"})}))
    meter = PowerMeter(UUID, sample_seconds=60)
    meter.begin()
    _, watts, busy, _ = meter.read()
    meter.close()
    assert (watts, busy) == (pytest.approx(100), pytest.approx(0.4))


@pytest.mark.parametrize("missing", ["library", "driver", "gpu"])
def test_nothing_is_known_without(missing, install):
    threads = threading.active_count()
    module = install(None if missing == "library" else stand_in({SECOND: Gpu()}, driver=missing != "driver"))
    meter = PowerMeter(UUID)
    meter.begin()
    assert all(math.isnan(value) for value in meter.read())
    assert threading.active_count() == threads
    meter.close()
    assert module is None or module.open == 0  # what was opened in vain is closed


def test_a_gpu_that_is_lost_and_a_counter_that_starts_anew(install):
    gpu = Gpu()
    install(stand_in({FIRST: gpu}))
    meter = PowerMeter(UUID, sample_seconds=0.005)
    meter.begin()
    gpu.counted_from += 3600  # the driver was loaded anew
    time.sleep(0.02)
    joules, watts, busy, _ = meter.read()
    assert math.isnan(joules) and math.isnan(watts) and busy == pytest.approx(0.8)
    meter.begin()
    gpu.lacks |= {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo"}
    time.sleep(0.02)
    joules, _, _, used = meter.read()
    meter.close()
    assert math.isnan(used)
    # The thread may have sampled before the GPU was lost.
    assert math.isnan(joules) or joules >= 0


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
def test_the_gpu_that_cuda_means_whatever_its_number(kind, install, monkeypatch):
    """cuda:0 is NVML's second GPU here, as with CUDA_VISIBLE_DEVICES=1."""
    install(stand_in({SECOND: Gpu(watts=1), f"{kind}-{UUID}": Gpu(watts=500)}))
    counts = {"num_alloc_retries": 3, "num_ooms": 1}
    counts |= {"allocated_bytes.all.peak": 5 * 2**30, "reserved_bytes.all.peak": 6 * 2**30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(counts))
    meter = HardwareMeter(CUDA)
    meter.begin()
    counts["num_alloc_retries"] = 7
    time.sleep(0.05)
    reading = meter.read()
    meter.close()
    assert reading.power_w == pytest.approx(500, rel=0.1)
    assert (reading.alloc_retries, reading.ooms) == (4, 0)
    assert (reading.peak_memory_gib, reading.reserved_memory_gib, reading.device_memory_gib) == (5, 6, 20)


def test_a_run_says_what_will_be_known(install, monkeypatch):
    assert hardware_note(CPU, torch.float32) == "MFU n/a (no peak is known for CPU), energy n/a (no NVML)"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    install(stand_in({f"GPU-{UUID}": Gpu()}))
    assert hardware_note(CUDA, torch.bfloat16) == "MFU of 989 TFLOP/s (NVIDIA H200), energy by NVML"
    install(None)
    assert hardware_note(CUDA, torch.bfloat16) == "MFU of 989 TFLOP/s (NVIDIA H200), energy n/a (no NVML)"


def test_a_cpu_tells_nothing():
    meter = HardwareMeter(CPU)
    meter.begin()
    figures = hardware_record(
        meter.read(),
        Distributed(0, 1, CPU),
        images=8,
        train_flops=1e9,
        train_seconds=1.0,
        peak=device_peak(CPU, torch.float32),
    )
    meter.close()
    assert figures == {}


class Together:
    """`reduce` of ranks that are threads of this process."""

    def __init__(self, world_size: int):
        self.world_size, self.barrier, self.given = world_size, threading.Barrier(world_size), {}

    def reduce(self, values: list[float], op: str = "sum") -> list[float]:
        self.given[threading.get_ident()] = values
        self.barrier.wait()
        columns = list(zip(*self.given.values(), strict=True))
        self.barrier.wait()
        return [max(column) if op == "max" else math.fsum(column) for column in columns]


def over_ranks(calls: list[dict]) -> list[dict[str, float]]:
    together, results = Together(len(calls)), {}

    def run(rank: int) -> None:
        results[rank] = hardware_record(ranks=together, **calls[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(len(calls))]


def test_figures_over_ranks():
    one = {"images": 64, "train_flops": 300e12, "train_seconds": 1.0, "peak": 1000e12}
    other = one | {"train_flops": 500e12}
    first, second = over_ranks(
        [
            one | {"reading": Reading(600, 300, 0.9, 0, 0, 30, 20, 25)},
            other | {"reading": Reading(1000, 500, 0.7, 2, 1, 40, 10, 35)},
        ]
    )
    assert first == second
    assert first == {
        "mfu": pytest.approx(0.4),
        "power_w": 800,
        "joules": 1600,
        "joules_per_image": 12.5,
        "utilisation": pytest.approx(0.8),
        "alloc_retries": 2,
        "ooms": 1,
        "device_memory_gib": 40,
        "peak_memory_gib": 20,
        "reserved_memory_gib": 35,
    }


def test_what_one_rank_does_not_know_is_absent():
    """An energy of half the ranks would look like a good one."""
    known = {"images": 0, "train_flops": 300e12, "train_seconds": 1.0, "peak": 1000e12}
    blind = Reading(*[math.nan] * 8)
    first, _ = over_ranks(
        [
            known | {"reading": Reading(600, 300, 0.9, 0, 0, 30, 20, 25)},
            known | {"peak": None, "reading": blind},
        ]
    )
    assert first == {}
    first, _ = over_ranks([known | {"reading": Reading(600, 300, 0.9, 0, 0, 30, 20, 25)}] * 2)
    assert first["mfu"] == pytest.approx(0.3)
    assert "joules_per_image" not in first and first["joules"] == 1200  # nothing was drawn


def test_overhead_is_under_a_hundredth_of_a_second_long_step(install):
    install(stand_in({FIRST: Gpu()}))
    meter = PowerMeter(UUID)
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        meter.begin()
        meter.read()
        times.append(time.perf_counter() - begun)
    meter.close()
    assert statistics.median(times) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_gpu():
    pytest.importorskip("pynvml")
    torch.cuda.reset_peak_memory_stats(CUDA)  # other tests' memory is no longer there
    meter = HardwareMeter(CUDA)
    meter.begin()
    matrix = torch.randn(4096, 4096, device=CUDA)
    until = time.perf_counter() + 1
    while time.perf_counter() < until:
        matrix = (matrix @ matrix).clamp(-1, 1)
        torch.cuda.synchronize()
    reading = meter.read()
    begun = time.perf_counter()
    meter.begin()
    meter.read()
    spent = time.perf_counter() - begun
    meter.close()
    assert 10 < reading.power_w < 2000 and 0 < reading.utilisation <= 1
    assert reading.device_memory_gib >= reading.reserved_memory_gib >= reading.peak_memory_gib > 0
    assert spent < 0.01
