"""What a step takes from its GPU: share of the peak, power and energy by NVML, and the state of torch's allocator.

Whatever a machine does not tell, for want of a GPU, a driver, nvidia-ml-py or a sensor, is NaN here and absent from the
metrics; it is never an error.
"""

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch

from fastcorl.runtime.distributed import Distributed

GIB = 2**30
SAMPLE_SECONDS = 0.2  # NVML's own averages are over a sixth of a second to a second

# Dense peaks in TFLOP/s, from NVIDIA's datasheets: half those of tensor cores where a sheet shows them with sparsity.
# (names as torch gives them without "NVIDIA", bfloat16 and float16 with float32 sums, TF32, float32, the sheet)
PEAKS = (
    (r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe", 312, 156, 19.5),  # A100 Tensor Core GPU
    (r"H100 80GB HBM3", 989.4, 494.7, 66.9),  # H100 Tensor Core GPU, SXM5
    (r"H100 PCIe", 756, 378, 51),  # H100 Tensor Core GPU, PCIe
    (r"H100 NVL", 835.5, 417.5, 60),  # H100 Tensor Core GPU, NVL
    (r"H200", 989.4, 494.7, 66.9),  # H200 Tensor Core GPU, SXM
    (r"L40S", 362.05, 183, 91.6),  # L40S
    (r"A10", 125, 62.5, 31.2),  # A10 Tensor Core GPU
    (r"GeForce RTX 4090", 165.2, 82.6, 82.6),  # Ada GPU architecture whitepaper
    (r"GeForce RTX 3090", 71, 35.6, 35.6),  # Ampere GA102 architecture whitepaper
    (r"B200", 2250, 1100, 75),  # Blackwell: HGX B200
)


def peak_flops(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Peak operations per second of dense matrix products by the vendor's datasheet; None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it. A slice of a GPU (MIG), a mobile or a regional variant
            has other peaks than its namesake, and is unknown.
        dtype: of the operands; tf32: whether float32 products are rounded to TF32.
    """
    name = re.sub(r"^NVIDIA ", "", device_name)
    for pattern, half, tensor_float, single in PEAKS:
        if re.fullmatch(pattern, name):
            rates = {torch.bfloat16: half, torch.float16: half, torch.float32: tensor_float if tf32 else single}
            return rates[dtype] * 1e12 if dtype in rates else None
    return None


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """`peak_flops` of a device as torch is set up now; None for a CPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return peak_flops(torch.cuda.get_device_name(device), dtype, tf32=tf32)


class PowerMeter:
    """Energy and use of one GPU since `begin`, by NVML.

    Energy comes from the chip's own counter, or, where it has none (before Volta, some consumer cards), from power
    sampled in a thread, as use of the chip always does.

    Args:
        uuid: the GPU's, with or without "GPU-"; None for no GPU. NVML and CUDA number GPUs differently, and
            CUDA_VISIBLE_DEVICES renumbers them again, so that an index would mean another GPU.
    """

    def __init__(self, uuid: str | None, *, sample_seconds: float = SAMPLE_SECONDS):
        self._nvml, self._handle = _open_nvml(uuid)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.begin()
        self._thread: threading.Thread | None = None
        if self._handle is not None:
            self._thread = threading.Thread(target=self._keep_sampling, args=(sample_seconds,), daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """Count from now on."""
        with self._lock:
            self._watts, self._busy = [0.0, 0], [0.0, 0]  # sum and number of samples
        self._start, self._millijoules = time.perf_counter(), self._energy()

    def read(self) -> tuple[float, float, float, float]:
        """Since `begin`: joules, mean watts, mean utilisation in [0, 1] (the share of time in which a kernel ran), and
        the GiB that are in use on the GPU now, by whomever. NaN for what is not known."""
        seconds = time.perf_counter() - self._start
        joules = (self._energy() - self._millijoules) / 1000
        if not self._busy[1]:  # it took less time than there is between samples
            self._sample()
        with self._lock:
            watts, busy = (_mean(values) for values in (self._watts, self._busy))
        if math.isnan(joules):
            joules = watts * seconds
        # The counter starts anew when the driver is loaded.
        joules = joules if joules >= 0 else math.nan
        used = self._ask("nvmlDeviceGetMemoryInfo", lambda info: info.used / GIB)
        return joules, joules / seconds if seconds else math.nan, busy, used

    def close(self) -> None:
        """Stop the thread and let go of NVML; nothing is known afterwards."""
        if self._handle is None:
            return
        self._stop.set()
        self._thread.join()
        self._handle = None
        self.begin()
        self._nvml.nvmlShutdown()

    def _energy(self) -> float:
        return self._ask("nvmlDeviceGetTotalEnergyConsumption", float)

    def _keep_sampling(self, sample_seconds: float) -> None:
        while not self._stop.wait(sample_seconds):
            self._sample()

    def _sample(self) -> None:
        watts = self._ask("nvmlDeviceGetPowerUsage", lambda milliwatts: milliwatts / 1000)
        busy = self._ask("nvmlDeviceGetUtilizationRates", lambda rates: rates.gpu / 100)
        with self._lock:
            for values, value in ((self._watts, watts), (self._busy, busy)):
                if not math.isnan(value):
                    values[0] += value
                    values[1] += 1

    def _ask(self, name: str, convert: Callable[[Any], float]) -> float:
        if self._handle is None:
            return math.nan
        try:
            return convert(getattr(self._nvml, name)(self._handle))
        except self._nvml.NVMLError:  # not supported by this chip, no permission, or the GPU is lost
            return math.nan


def _mean(values: list) -> float:
    return values[0] / values[1] if values[1] else math.nan


def _open_nvml(uuid: str | None) -> tuple[Any, Any]:
    """The library and the handle of a GPU; None for both where there is no such thing."""
    if uuid is None:
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None
    bare = re.sub(r"^(GPU|MIG)-", "", uuid)
    for kind in ("GPU", "MIG"):
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{bare}")
        except pynvml.NVMLError:
            continue
    pynvml.nvmlShutdown()
    return None, None


@dataclass(frozen=True)
class Reading:
    """One rank's step; NaN where unknown. `alloc_retries` counts how often torch's allocator had to give its cache back
    to get memory, `ooms` how often that did not help; the two peaks are since the start, allocated and reserved."""

    joules: float
    power_w: float
    utilisation: float
    alloc_retries: float
    ooms: float
    device_memory_gib: float
    peak_memory_gib: float
    reserved_memory_gib: float


class HardwareMeter:
    """Measures steps on one device: `begin` before each, `read` after it."""

    def __init__(self, device: torch.device):
        self.device = device
        uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        self.power = PowerMeter(uuid)
        self._retries = self._ooms = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._retries, self._ooms, *_ = self._allocator()
        self.power.begin()

    def read(self) -> Reading:
        """What the step took so far. On CUDA the caller has synchronised the device."""
        joules, watts, busy, used = self.power.read()
        retries, ooms, allocated, reserved = self._allocator()
        return Reading(joules, watts, busy, retries - self._retries, ooms - self._ooms, used, allocated, reserved)

    def close(self) -> None:
        self.power.close()

    def _allocator(self) -> tuple[float, float, float, float]:
        if self.device.type != "cuda":
            return (math.nan,) * 4
        stats = torch.cuda.memory_stats(self.device)
        return (
            stats.get("num_alloc_retries", math.nan),
            stats.get("num_ooms", math.nan),
            stats.get("allocated_bytes.all.peak", math.nan) / GIB,
            stats.get("reserved_bytes.all.peak", math.nan) / GIB,
        )


def hardware_note(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the start of a run: what of MFU and energy its steps will tell."""
    peak = device_peak(device, dtype)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    meter = HardwareMeter(device)
    energy = "by NVML" if math.isfinite(meter.read().joules) else "n/a (no NVML)"
    meter.close()
    mfu = f"n/a (no peak is known for {kind})" if peak is None else f"of {peak / 1e12:,.0f} TFLOP/s ({kind})"
    return f"MFU {mfu}, energy {energy}"


def hardware_record(
    reading: Reading,
    ranks: Distributed,
    *,
    images: int,
    train_flops: float,
    train_seconds: float,
    peak: float | None,
) -> dict[str, float]:
    """Figures of a step over all ranks, for its metrics; a collective call. What one rank does not know is absent.

    `mfu` is the share of the peak that the training phase reached with useful operations (PaLM, arXiv 2204.02311,
    appendix B); `power_w`, `joules`, `alloc_retries` and `ooms` are sums over ranks, `utilisation` is their mean, and
    memory the largest; `joules_per_image` spreads all energy of the step over its drawings.

    Args:
        images, train_flops, train_seconds: this rank's drawings, useful operations of the training phase, its seconds.
        peak: of this rank's device, in operations per second; None where unknown.
    """
    joules, power, busy, retries, ooms, *memory = astuple(reading)
    possible = math.nan if peak is None else peak * train_seconds
    sums = ranks.reduce([joules, power, busy, retries, ooms, float(images), float(train_flops), possible])
    joules, power, busy, retries, ooms, images, done, possible = sums
    # NaN wins over any number in a sum, in a maximum not everywhere; no peak is below 0.
    used, allocated, reserved = ranks.reduce([math.inf if math.isnan(gib) else gib for gib in memory], "max")
    figures = {
        "mfu": done / possible if possible else math.nan,
        "power_w": power,
        "joules": joules,
        "joules_per_image": joules / images if images else math.nan,
        "utilisation": busy / ranks.world_size,
        "alloc_retries": retries,
        "ooms": ooms,
        "device_memory_gib": used,
        "peak_memory_gib": allocated,
        "reserved_memory_gib": reserved,
    }
    return {name: value for name, value in figures.items() if math.isfinite(value)}
