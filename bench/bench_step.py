"""A unified step, from prompts to updated weights: fastcorl's trainer and a plain one on transformers.

Every round runs the baseline, our step without each of its features in turn, and our step, one after the other; ratios
are medians over rounds of times taken within the same round, as in bench/bench_rollout.py. The floor on a CPU is the
time of the provider's own arithmetic at the rate of a large product in that round. Peak memory is that of a process of
its own (bench/step_alone.py), on a GPU what torch allocates, less what the other contestant holds.
"""

import math
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import median

import torch

from bench.arithmetic import counted, product_rate
from bench.bench_rollout import ratio
from bench.goals import BASELINE, OURS
from bench.measure import synchronize
from bench.peers.ours_step import FEATURES, OurStep
from bench.shapes import parametrize
from bench.step_alone import figures_of
from bench.step_problems import PROBLEMS, FixedPrompts
from fastcorl.runtime.hardware import HardwareMeter

WITHOUT = {f"fastcorl, without {feature}": feature for feature in FEATURES}
OTHER_ARITHMETIC = [f"fastcorl, without {feature}" for feature in ("packing", "prefix sharing", "vision reuse")]
SAMPLES = (16, 64, 256)
SAMPLES_ROUNDS = 2
GROUP_SIZE = PROBLEMS["quickstart"].group_size


class Contestants:
    """Ours and the baseline, each with weights of its own; what they train, they keep."""

    def __init__(self, problem):
        policy = problem.policy()
        self.baseline = problem.baseline(policy)
        self.baseline_prompts = problem.baseline_prompts
        self.ours = OurStep(problem.trainer(policy))
        self.prompts = problem.make_prompts()
        self.meter = HardwareMeter(policy.device)

    def take(self, problem):
        """Further steps are of `problem`'s prompts."""
        self.prompts = problem.make_prompts()
        self.ours.trainer.collector.prompts = FixedPrompts(self.prompts)

    def step(self, provider):
        """(seconds, seconds by phase, rows, mean answer length, what the hardware tells) of a step."""
        device, parts = self.meter.device, 1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        self.meter.begin()
        start = time.perf_counter()
        figures = {}
        if provider == BASELINE:
            prompts = self.prompts[: self.baseline_prompts]
            result, parts = self.baseline.step(prompts), len(self.prompts) // len(prompts)
            rollout, phases = result.samples, {name: parts * taken for name, taken in result.seconds.items()}
        else:
            with self.ours.without(WITHOUT.get(provider)):
                record, rollout = self.ours.step()
            phases = record.seconds
            if "mfu" in record.metrics:
                figures["mfu"] = record.metrics["mfu"]
        synchronize(device)
        seconds, joules = parts * (time.perf_counter() - start), self.meter.read().joules
        if math.isfinite(joules):
            figures["joules_per_sample"] = joules / rollout.num_rows
        if device.type == "cuda":  # on a CPU a process of its own tells
            peak = torch.cuda.max_memory_allocated(device)
            others = held - self._baseline_bytes() if provider == BASELINE else self._baseline_bytes()
            figures |= {"peak_mib": (peak - others) / 2**20, "extra_mib": (peak - held) / 2**20}
        return seconds, phases, parts * rollout.num_rows, float(rollout.texts.lengths.float().mean()), figures

    def _baseline_bytes(self):
        """Of its model and its optimizer's state."""
        model, states = self.baseline.janus, self.baseline.optimizer.state.values()
        tensors = chain(model.parameters(), model.buffers(), *(state.values() for state in states))
        return sum(tensor.nbytes for tensor in tensors)


class Clock:
    """Times of steps by label, of every round."""

    def __init__(self):
        self.times, self.phases, self.lengths = defaultdict(list), defaultdict(list), defaultdict(list)
        self.figures = {}
        self.rates = []  # of large products, on a CPU

    def run(self, label, contestants, provider):
        seconds, phases, rows, length, self.figures[label] = contestants.step(provider)
        self.times[label].append(seconds)
        self.phases[label].append(phases)
        self.lengths[label].append(length)
        return rows

    def entry(self, label, ours, rows, **fields):
        times, phases = self.times[label], self.phases[label]
        if "flop" in fields:
            floors = [fields["flop"] / rate for rate in self.rates[: len(times)]]
            fields |= {"floor_s": median(floors), "ratio_to_floor": ratio(times, floors)}
        return {
            "op": "step",
            "median_s": median(times),
            "ratio_to_ours": ratio(times, self.times[ours][: len(times)]),
            "rate": rows / median(times),
            "unit": "samples",
            "answer_tokens": median(self.lengths[label]),
            "phases_s": {name: median(each[name] for each in phases) for name in phases[0]},
            **self.figures[label],
            **fields,
        }


@parametrize(PROBLEMS)
def bench_step(benchmark, shape):
    problem = PROBLEMS[shape]
    without = WITHOUT if problem.feature_rounds else {}
    providers = (BASELINE, *without, OURS)
    on_cpu = problem.device == "cpu"
    alone = {provider: figures_of(shape, provider) for provider in (BASELINE, OURS)} if on_cpu else {}
    contestants, clock = Contestants(problem), Clock()
    contestants.step(OURS)  # warms up what our engine prepares for a shape
    if on_cpu and without:
        alone |= {provider: {"flop": counted(partial(contestants.step, provider))} for provider in OTHER_ARITHMETIC}

    def others():
        if on_cpu:
            clock.rates.append(product_rate())
        clock.run(BASELINE, contestants, BASELINE)
        if len(clock.times[OURS]) < problem.feature_rounds:
            for provider in WITHOUT:
                clock.run(provider, contestants, provider)

    benchmark.group = f"step: {shape}"
    benchmark.pedantic(clock.run, args=(OURS, contestants, OURS), setup=others, rounds=problem.rounds)
    if benchmark.enabled:
        benchmark.extra_info["entries"] = [
            clock.entry(provider, OURS, problem.rows, shape=shape, provider=provider, **alone.get(provider, {}))
            for provider in providers
        ]


def bench_number_of_samples(benchmark):
    """How a step of the quickstart grows with its samples: the time per sample should not."""
    problems = {count: replace(PROBLEMS["quickstart"], prompts=count // GROUP_SIZE) for count in SAMPLES}
    contestants, clock = Contestants(problems[SAMPLES[0]]), Clock()

    def run(counts):
        for count in counts:
            contestants.take(problems[count])
            clock.run(count, contestants, OURS)

    for count in SAMPLES:
        contestants.take(problems[count])
        contestants.step(OURS)
    benchmark.group = "step: number of samples"
    benchmark.pedantic(run, args=(SAMPLES[-1:],), setup=lambda: run(SAMPLES[:-1]), rounds=SAMPLES_ROUNDS)
    if benchmark.enabled:
        benchmark.extra_info["entries"] = [
            clock.entry(count, count, count, shape=f"quickstart, {count} samples", provider=OURS) for count in SAMPLES
        ]
