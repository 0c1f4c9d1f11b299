"""One benchmark of one provider: right first, then its memory, then its time in rounds with our kernel and the floor.

A machine drifts while it is measured. Every round therefore runs the floor, our kernel and the provider one after the
other, and the ratios are medians over rounds of times taken within the same round.
"""

import time
from collections import defaultdict
from statistics import median

import torch

from bench.goals import OURS
from bench.memory import extra_bytes

SECONDS = {"cpu": 0.7, "cuda": 0.3}  # of measured rounds, and their number in any case
MIN_ROUNDS, MAX_ROUNDS = 5, 200
WARMUP_SECONDS = {"cpu": 0.3, "cuda": 0.1}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def errors_of(outputs, expected):
    """Relative errors in norm; a scalar's is absolute, since advantages of size 1 may cancel to nothing."""
    for output, exact in zip(outputs, expected, strict=True):
        assert output.shape == exact.shape, f"{tuple(output.shape)} instead of {tuple(exact.shape)}"
        distance = (output.double() - exact).norm()
        yield float(distance if exact.dim() == 0 else distance / exact.norm())


def measure(benchmark, provider, providers, problem, *, op, shape, expected, floor, run):
    """Check and time ``providers[provider]`` on ``problem``.

    ``run`` maps a contestant to the outputs of the call that is timed, ``expected`` are those in float64, and ``shape``
    is its name.
    """
    contestant = providers[provider](problem)
    ours = contestant if provider == OURS else providers[OURS](problem)
    leaf = problem.leaves[0]
    errors = list(errors_of(contestant.read(run(contestant)), expected))
    tolerance = TOLERANCE[leaf.dtype]
    assert all(error <= tolerance for error in errors), f"{provider} is off by {errors}, more than {tolerance:.0e}"
    contestant.before()
    extra = extra_bytes(lambda: run(contestant), leaf.device)

    calls = {"floor": floor.run, "ours": lambda: run(ours), "provider": lambda: run(contestant)}
    times = defaultdict(list)

    def clock(who):
        synchronize(leaf.device)
        start = time.perf_counter()
        calls[who]()
        synchronize(leaf.device)
        times[who].append(time.perf_counter() - start)

    def others():
        clock("floor")
        if contestant is not ours:
            clock("ours")
        contestant.before()

    others()
    clock("provider")
    seconds = sum(taken[-1] for taken in times.values())
    rounds = min(max(int(SECONDS[leaf.device.type] / seconds), MIN_ROUNDS), MAX_ROUNDS)
    warmup_rounds = max(int(WARMUP_SECONDS[leaf.device.type] / seconds), 1)
    benchmark.group = f"{op}: {shape}"
    benchmark.pedantic(clock, args=("provider",), setup=others, rounds=rounds, warmup_rounds=warmup_rounds)
    if not benchmark.enabled:
        return

    last = {who: taken[-rounds:] for who, taken in times.items()}
    last.setdefault("ours", last["provider"])
    benchmark.extra_info |= {
        "op": op,
        "shape": shape,
        "provider": provider,
        "median_s": median(last["provider"]),
        "ratio_to_floor": _ratio(last["provider"], last["floor"]),
        "ratio_to_ours": _ratio(last["provider"], last["ours"]),
        "floor_s": median(last["floor"]),
        "work": floor.work,
        "unit": floor.unit,
        "rate": floor.work / median(last["provider"]),
        "extra_mib": extra / 2**20,
        "error": max(errors),
    }


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def _ratio(times, others):
    return median(time / other for time, other in zip(times, others, strict=True))
