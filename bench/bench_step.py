"""A unified step, from prompts to updated weights: fastcorl's trainer and a plain one on transformers.

Every round runs the baseline, our step without each of its features in turn, and our step, one after the other; ratios
are medians over rounds of times taken within the same round, as in bench/bench_rollout.py. Peak memory is that of a
process of its own (bench/step_memory.py), on a GPU what torch allocates with both contestants there.
"""

import math
import time
from collections import defaultdict
from dataclasses import replace
from statistics import median

import torch

from bench.bench_rollout import ratio
from bench.goals import BASELINE, OURS
from bench.peers.ours_step import FEATURES, OurStep
from bench.shapes import parametrize
from bench.step_memory import peak_of
from bench.step_problems import PROBLEMS, FixedPrompts
from fastcorl.runtime.hardware import HardwareMeter

WITHOUT = {f"fastcorl, without {feature}": feature for feature in FEATURES}
SAMPLES = (16, 64, 256)
SAMPLES_ROUNDS = 2
GROUP_SIZE = PROBLEMS["quickstart"].group_size


class Contestants:
    """Ours and the baseline, each with weights of its own; what they train, they keep."""

    def __init__(self, problem):
        policy = problem.policy()
        self.baseline = problem.baseline(policy)
        self.ours = OurStep(problem.trainer(policy))
        self.prompts = problem.make_prompts()
        self.meter = HardwareMeter(policy.device)

    def take(self, problem):
        """Further steps are of `problem`'s prompts."""
        self.prompts = problem.make_prompts()
        self.ours.trainer.collector.prompts = FixedPrompts(self.prompts)

    def step(self, provider):
        """(seconds, seconds by phase, rows, mean answer length, what the hardware tells) of a step."""
        device = self.meter.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        self.meter.begin()
        start = time.perf_counter()
        figures = {}
        if provider == BASELINE:
            result = self.baseline.step(self.prompts)
            rollout, phases = result.samples, result.seconds
        else:
            with self.ours.without(WITHOUT.get(provider)):
                record, rollout = self.ours.step()
            phases = record.seconds
            if "mfu" in record.metrics:
                figures["mfu"] = record.metrics["mfu"]
        seconds, joules = time.perf_counter() - start, self.meter.read().joules
        if math.isfinite(joules):
            figures["joules_per_sample"] = joules / rollout.num_rows
        if device.type == "cuda":  # on a CPU a process of its own tells
            peak = torch.cuda.max_memory_allocated(device)
            figures |= {"peak_mib": peak / 2**20, "extra_mib": (peak - held) / 2**20}
        return seconds, phases, rollout.num_rows, float(rollout.texts.lengths.float().mean()), figures


class Clock:
    """Times of steps by label, of every round."""

    def __init__(self):
        self.times, self.phases, self.lengths = defaultdict(list), defaultdict(list), defaultdict(list)
        self.figures = {}

    def run(self, label, contestants, provider):
        seconds, phases, rows, length, self.figures[label] = contestants.step(provider)
        self.times[label].append(seconds)
        self.phases[label].append(phases)
        self.lengths[label].append(length)
        return rows

    def entry(self, label, ours, rows, **fields):
        times, phases = self.times[label], self.phases[label]
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
    peaks = {}
    if problem.device == "cpu":
        peaks = {provider: peak_of(shape, WITHOUT.get(provider, provider)) for provider in (BASELINE, OURS)}
    contestants, clock = Contestants(problem), Clock()
    contestants.step(OURS)  # warms up what our engine prepares for a shape

    def others():
        clock.run(BASELINE, contestants, BASELINE)
        if len(clock.times[OURS]) < problem.feature_rounds:
            for provider in WITHOUT:
                clock.run(provider, contestants, provider)

    benchmark.group = f"step: {shape}"
    benchmark.pedantic(clock.run, args=(OURS, contestants, OURS), setup=others, rounds=problem.rounds)
    if benchmark.enabled:
        benchmark.extra_info["entries"] = [
            clock.entry(provider, OURS, problem.rows, shape=shape, provider=provider, **peaks.get(provider, {}))
            for provider in providers
        ]


def bench_number_of_samples(benchmark):
    """How a step of the quickstart grows with its samples: the time per sample should not. The baseline runs once."""
    problems = {count: replace(PROBLEMS["quickstart"], prompts=count // GROUP_SIZE) for count in SAMPLES}
    contestants, clock = Contestants(problems[SAMPLES[0]]), Clock()

    def run(provider, counts):
        for count in counts:
            contestants.take(problems[count])
            clock.run((provider, count), contestants, provider)

    def others():
        if not clock.times:
            run(BASELINE, SAMPLES)
        run(OURS, SAMPLES[:-1])

    for count in SAMPLES:
        contestants.take(problems[count])
        contestants.step(OURS)
    benchmark.group = "step: number of samples"
    benchmark.pedantic(run, args=(OURS, SAMPLES[-1:]), setup=others, rounds=SAMPLES_ROUNDS)
    if benchmark.enabled:
        benchmark.extra_info["entries"] = [
            clock.entry(
                (provider, count), (OURS, count), count, shape=f"quickstart, {count} samples", provider=provider
            )
            for count in SAMPLES
            for provider in (BASELINE, OURS)
        ]
