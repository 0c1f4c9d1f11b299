"""Rollouts, from prompts to pixels and answers: fastcorl's engine and transformers' ``generate`` on the same weights.

Every round runs the floor, the peers and our engine one after the other, and ratios are medians over rounds of times
taken within the same round, as in bench/measure.py. One benchmark holds the entries of all its providers. Tokenisation,
preprocessing, vision tower, VQ decoder and detokenisation are timed on both sides.
"""

import time
from collections import defaultdict
from functools import lru_cache
from itertools import cycle
from statistics import median

import torch

from bench.goals import OURS, SINGLE, WHOLE
from bench.measure import synchronize
from bench.peers.ours_rollout import OurRollout
from bench.peers.transformers_rollout import TransformersRollout
from bench.rollout_floor import RolloutFloor
from bench.rollout_problems import WORKLOADS, make_policy, make_prompts
from bench.shapes import parametrize

CHECKED_PROMPTS = 2
UNITS = {"images": "images", "answers": "tokens", "mixed": "pairs"}


@lru_cache(maxsize=1)
def prepare(model, device):
    policy = make_policy(model, device)
    theirs = TransformersRollout(policy)
    ours = OurRollout(policy)
    if model == "quickstart":
        check_greedy(ours, theirs)
    return policy, ours, theirs


def check_greedy(ours, theirs):
    """Without noise both sides draw and answer the same; larger models have random weights, and ties in bfloat16."""
    prompts = make_prompts(WORKLOADS["quickstart mixed"])[:CHECKED_PROMPTS]
    new_tokens = WORKLOADS["quickstart mixed"].answer_tokens
    rollout = ours.generate(prompts, new_tokens, greedy=True)
    codes, pixels = theirs.images(prompts, greedy=True)
    assert torch.equal(rollout.images.tokens, codes)
    torch.testing.assert_close(rollout.images.pixels, pixels, rtol=0, atol=1e-4)
    tokens, answers = theirs.answers(prompts, new_tokens, greedy=True)
    assert torch.equal(rollout.texts.tokens, tokens)
    assert rollout.texts.answers == [answer.strip() for answer in answers]


def run_ours(ours, prompts, workload):
    rollout = ours.generate(prompts, workload.answer_tokens, draw=workload.draws, answer=workload.answers)
    if workload.draws:
        assert len(rollout.images.pixels) == len(rollout.images.tokens) == workload.rows
    if workload.answers:
        assert rollout.texts.lengths.tolist() == [workload.answer_tokens] * workload.rows


def run_theirs(theirs, prompts, workload):
    tokens, decoded = theirs.images(prompts) if workload.draws else theirs.answers(prompts, workload.answer_tokens)
    length = theirs.processor.num_image_tokens if workload.draws else workload.answer_tokens
    assert tokens.shape == (len(decoded), length)


def contestants(workload, prompts, ours, theirs):
    """Calls by provider, and how many such calls make the whole workload."""
    if workload.kind == "mixed":

        def two_calls():
            ours.generate(prompts, workload.answer_tokens, answer=False)
            ours.generate(prompts, workload.answer_tokens, draw=False)

        peers = {"fastcorl, two calls": (two_calls, 1)}
    else:
        # As the public CoRL trainer calls it. A round takes one of the prompts, all of which take equally long.
        single = cycle([[prompt] for prompt in prompts])
        peers = {
            WHOLE: (lambda: run_theirs(theirs, prompts, workload), 1),
            SINGLE: (lambda: run_theirs(theirs, next(single), workload), len(prompts)),
        }
        peers = {name: call for name, call in peers.items() if name in workload.peers}
    return {**peers, OURS: (lambda: run_ours(ours, prompts, workload), 1)}


@parametrize(WORKLOADS)
def bench_rollout(benchmark, shape):
    workload = WORKLOADS[shape]
    policy, ours, theirs = prepare(workload.model, workload.device)
    prompts = make_prompts(workload)
    floor = RolloutFloor(policy, prompts, workload)
    calls = contestants(workload, prompts, ours, theirs)
    times = defaultdict(list)

    def clock(provider):
        call, calls_in_all = calls[provider]
        synchronize(policy.device)
        start = time.perf_counter()
        call()
        synchronize(policy.device)
        times[provider].append((time.perf_counter() - start) * calls_in_all)
        if provider == OURS:
            for stage in ("vision", "pixels"):
                times[stage].append(ours.spent[stage])

    def others():
        times["floor"].append(floor.seconds())
        for provider in calls:
            if provider != OURS:
                clock(provider)

    run_ours(ours, prompts, workload)  # warms up what our engine prepares for a shape
    benchmark.group = f"rollout: {shape}"
    benchmark.pedantic(clock, args=(OURS,), setup=others, rounds=workload.rounds)
    if not benchmark.enabled:
        return

    frozen = zip(times["floor"], times["vision"], times["pixels"], strict=True)
    floors = [sum(parts) for parts in frozen]
    count = workload.rows * (workload.answer_tokens if workload.kind == "answers" else 1)
    benchmark.extra_info["entries"] = [
        {
            "op": "rollout",
            "shape": shape,
            "provider": provider,
            "median_s": median(times[provider]),
            "ratio_to_floor": ratio(times[provider], floors),
            "ratio_to_ours": ratio(times[provider], times[OURS]),
            "floor_s": median(floors),
            "rate": count / median(times[provider]),
            "unit": UNITS[workload.kind],
            "stages_s": stages(workload, prompts, ours, times) if provider == OURS else {},
        }
        for provider in calls
    ]


def stages(workload, prompts, ours, times):
    """Seconds in parts of our call. Answers that end at once tell what the prefill takes; elsewhere decoding has it."""
    parts = {stage: median(times[stage]) for stage in ("vision", "pixels")}
    if workload.kind == "answers":
        start = time.perf_counter()
        ours.generate(prompts, 1, draw=False)
        parts["prefill"] = time.perf_counter() - start - ours.spent["vision"]
    return {**parts, "decode": median(times[OURS]) - sum(parts.values())}


def ratio(times, others):
    return median(time / other for time, other in zip(times, others, strict=True))
