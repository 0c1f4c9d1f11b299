"""Peak memory of a call: bytes alive at once, above what was alive before it."""

import gc
import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def extra_bytes(call, device):
    """The peak of ``call()`` above its inputs and outside of what it returns, such as gradients that all must return.

    Negative for a call that returns its input overwritten.
    """
    gc.collect()
    peak, outputs = (_peak_cuda if device.type == "cuda" else _peak_cpu)(call)
    return peak - sum(output.nbytes for output in outputs)


def _peak_cuda(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, outputs


def _peak_cpu(call):
    """From the allocator's own events, which the profiler's trace lists: they include what an operator needs inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak, outputs
