"""Markdown tables from pytest-benchmark's JSON: ``python -m bench.summary RESULTS.json... > TABLES.md``."""

import json
import sys
from itertools import groupby
from pathlib import Path

from bench.goals import OURS, goal_rows

HEADER = """| shape | provider | median | / floor | / fastcorl | rate | extra MiB | error |
|---|---|--:|--:|--:|--:|--:|--:|"""

ROLLOUT_HEADER = """| shape | provider | median | rate | / fastcorl | of floor | vision | prefill | decode | pixels |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""

STEP_HEADER = """\
| shape | provider | median | samples/s | / fastcorl | GFLOP | of floor | rollout | score | train | peak MiB \
| extra MiB | MFU | J/sample |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""

SCALING_HEADER = """| shape | provider | median | / fastcorl | efficiency | communication | rollout | score | train |
|---|---|--:|--:|--:|--:|--:|--:|--:|"""

GOALS_HEADER = """| op | shape | goal | measured | |
|---|---|---|--:|---|"""

ROLLOUT_LEGEND = """
`rate` counts whole rollouts, from prompts to pixels and answers. `/ fastcorl` is a median of ratios within one round;
above 1 is slower. `of floor` is the least time that bytes and matrix products leave on this machine, as
bench/rollout_floor.py sums it up, over the provider's. Our stages: vision tower, prefill of the questions (within
`decode` where there are drawings), decode steps, and VQ decoder."""

STEP_LEGEND = """
A step goes from prompts to updated weights. `/ fastcorl` is a median of ratios within one round; above 1 is slower.
`GFLOP` are the products, convolutions and attention of the whole step, `of floor` is the time of these at the rate of a
large product, measured in every round, over the provider's. `train` has forward, backward and the optimizer. `peak MiB`
is resident memory of a process that does nothing else, `extra MiB` what a step takes of it above what was resident
before. The plain trainer samples 16 rows at a time, runs padded forwards with whole logits and the vision tower for
every answer (bench/baselines). Without packing each sequence is a micro-batch of its own; without vision reuse the
training forward runs the tower for every answer; without mixed rollout drawings and answers are sampled one after the
other; with rewards in turn or beside sampling, whichever is not the default of the device, the thread of
`rollout.overlap` is switched; without fused loss torch's autograd sees whole logits. `MFU` is of
the training phase, and energy by NVML, where there is a GPU."""

SCALING_LEGEND = """
`efficiency` of a provider is the time of a step on one rank alone over the provider's with as many samples on each
rank, less `communication`, the time in which two ranks add as many numbers as there are gradients."""

KERNELS_LEGEND = """
`/ floor` and `/ fastcorl` are medians of ratios within one round, in which the floor, fastcorl and the provider run one
after the other; above 1 is slower. The floor is a copy that moves the bytes that the op must move, or the matrix
products that it cannot do without; `rate` is that work over the median. `extra MiB` is the peak above the inputs and
outside of the outputs and gradients. `error` is the largest relative error in norm of an output or a gradient, against
float64; that of a loss is absolute."""


def title(result):
    """Machine, versions and date of one run."""
    machine = result["machine_info"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    device = f"{machine['gpu']}, CUDA {machine['cuda']}; " if machine["gpu"] else ""
    host = f"{machine['cpu']} ({machine['vectors']}), {machine['threads']} threads; Python {machine['python']}"
    return f"{result['datetime'][:10]}. {device}{host}, {packages}."


def duration(seconds):
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{seconds / scale:.3g} {unit}"


def rate(entry):
    prefix, scale = next(((p, s) for p, s in (("T", 1e12), ("G", 1e9)) if entry["rate"] >= s), ("M", 1e6))
    return f"{entry['rate'] / scale:.3g} {prefix}{entry['unit']}/s"


def row(entry):
    cells = (
        entry["shape"],
        entry["provider"],
        duration(entry["median_s"]),
        f"{entry['ratio_to_floor']:.2f}",
        f"{entry['ratio_to_ours']:.2f}",
        rate(entry),
        f"{entry['extra_mib']:.1f}",
        f"{entry['error']:.0e}",
    )
    return cells


def rollout_row(entry):
    stages = entry["stages_s"]
    cells = (
        entry["shape"],
        entry["provider"],
        duration(entry["median_s"]),
        f"{entry['rate']:.4g} {entry['unit']}/s",
        f"{entry['ratio_to_ours']:.2f}",
        f"{1 / entry['ratio_to_floor']:.2f}",
        *(duration(stages[name]) if stages.get(name) else "" for name in ("vision", "prefill", "decode", "pixels")),
    )
    return cells


def step_row(entry):
    phases = entry["phases_s"]
    cells = (
        entry["shape"],
        entry["provider"],
        duration(entry["median_s"]),
        f"{entry['rate']:.3g}",
        f"{entry['ratio_to_ours']:.2f}",
        f"{entry['flop'] / 1e9:.0f}" if "flop" in entry else "",
        f"{1 / entry['ratio_to_floor']:.2f}" if "ratio_to_floor" in entry else "",
        *(duration(phases[name]) for name in ("rollout", "score", "train")),
        *(f"{entry[name]:.0f}" if name in entry else "" for name in ("peak_mib", "extra_mib")),
        f"{entry['mfu']:.2f}" if "mfu" in entry else "",
        f"{entry['joules_per_sample']:.3g}" if "joules_per_sample" in entry else "",
    )
    return cells


def scaling_row(entry):
    cells = (
        entry["shape"],
        entry["provider"],
        duration(entry["median_s"]),
        f"{entry['ratio_to_ours']:.2f}",
        f"{entry['efficiency']:.2f}",
        duration(entry["communication_s"]) if entry["communication_s"] else "",
        *(duration(entry["phases_s"][name]) for name in ("rollout", "score", "train")),
    )
    return cells


LAYOUTS = {
    "rollout": (ROLLOUT_HEADER, rollout_row, ROLLOUT_LEGEND),
    "step": (STEP_HEADER, step_row, STEP_LEGEND),
    "scaling": (SCALING_HEADER, scaling_row, SCALING_LEGEND),
}
KERNELS = (HEADER, row, KERNELS_LEGEND)


RATIOS_HEADER = """| op | shape | fastcorl | share of the floor | times as fast as |
|---|---|--:|--:|---|"""


def ratio_table(entries):
    """All ops in one table: our time, what part of it the floor takes, and how much longer each of the others."""
    yield RATIOS_HEADER
    for (op, shape), group in groupby(entries, key=lambda entry: (entry["op"], entry["shape"])):
        by_provider = {entry["provider"]: entry for entry in group}
        ours = by_provider.pop(OURS, None)
        if ours is None:
            continue
        share = f"{1 / ours['ratio_to_floor']:.2f}" if "ratio_to_floor" in ours else ""
        others = ", ".join(f"{entry['ratio_to_ours']:.2f} {provider}" for provider, entry in by_provider.items())
        yield f"| {op} | {shape} | {duration(ours['median_s'])} | {share} | {others} |"


def tables(entries):
    """One table for each op."""
    for op, group in groupby(entries, key=lambda entry: entry["op"]):
        header, make_row, _ = LAYOUTS.get(op, KERNELS)
        yield f"\n## {op}\n{header}"
        for entry in group:
            yield "| " + " | ".join(make_row(entry)) + " |"


def entries_of(result):
    """Each benchmark holds one entry, or those of all its providers."""
    for benchmark in result["benchmarks"]:
        yield from entries_in(benchmark["extra_info"])


def entries_in(extra_info):
    return extra_info.get("entries", [extra_info] if extra_info else [])


def legends(entries):
    used = {LAYOUTS.get(entry["op"], KERNELS)[2] for entry in entries}
    return [legend for legend in (KERNELS_LEGEND, ROLLOUT_LEGEND, STEP_LEGEND, SCALING_LEGEND) if legend in used]


def main(paths):
    results = [json.loads(Path(path).read_text()) for path in paths]
    entries = [entry for result in results for entry in entries_of(result)]
    print("\n".join(dict.fromkeys(map(title, results))), *legends(entries), sep="\n")
    goals = list(goal_rows({(entry["op"], entry["shape"], entry["provider"]): entry for entry in entries}))
    if goals:
        print("\n## Goals", GOALS_HEADER, *goals, sep="\n")
    print(*tables(entries), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
