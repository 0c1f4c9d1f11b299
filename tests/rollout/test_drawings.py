"""Drawings are decoded and announced as they finish, and nothing of it shows in the rollout."""

from contextlib import contextmanager

import pytest
import torch

from fastcorl.model import Policy
from fastcorl.rollout import RolloutEngine, SamplingParams, results
from fastcorl.rollout.results import Drawings
from fastcorl.rollout.rows import ImageRows
from fastcorl.rollout.worker import PolicyWorker
from tests.helpers import IMAGE_SIZE, NUM_IMAGE_TOKENS

PARAMS = SamplingParams(1.0, 5.0, 40)
ROWS = 20  # of 5 prompts


class Log:
    """What happens in a call, in order: "step", the number of drawings decoded, or an announced rollout."""

    def __init__(self, monkeypatch):
        self.events = []
        step, decode = PolicyWorker.step, Policy.decode_images

        def logged_step(worker):
            self.events.append("step")
            step(worker)

        def logged_decode(policy, codes):
            self.events.append(len(codes))
            return decode(policy, codes)

        monkeypatch.setattr(PolicyWorker, "step", logged_step)
        monkeypatch.setattr(Policy, "decode_images", logged_decode)

    def take(self):
        events, self.events = self.events, []
        return events


@pytest.fixture
def log(monkeypatch):
    return Log(monkeypatch)


@pytest.fixture
def small_batches(monkeypatch):
    """Drawings are decoded six at a time."""
    monkeypatch.setattr(results, "DECODE_PIXELS_AT_ONCE", 6 * IMAGE_SIZE**2)


def assert_equal(ours, theirs):
    for name in ("tokens", "log_probs", "cond_log_probs", "pixels"):
        value = getattr(ours, name)
        assert torch.equal(value, getattr(theirs, name)), name
        assert not value.is_inference() and not value.requires_grad


@pytest.mark.parametrize("cache", ["grouped", "paged"])
def test_drawings_are_announced_before_the_last_answer_ends(policy, prompts, log, cache):
    engine = RolloutEngine(policy, cache=cache)
    expected = engine.generate(prompts, 4, PARAMS, seed=7)
    assert log.take()[-1] == ROWS  # decoded last
    rollout = engine.generate(prompts, 4, PARAMS, seed=7, on_drawings=log.events.append)
    *before, announced = log.events[: log.events.index(ROWS) + 2]
    assert before == ["step"] * (NUM_IMAGE_TOKENS - 1) + [ROWS]
    after = log.take()[len(before) + 1 :]
    assert set(after) == {"step"} and len(after) == int(rollout.texts.lengths.max()) - NUM_IMAGE_TOKENS
    assert announced.texts is None and announced.prompts == prompts and announced.group_size == 4
    assert_equal(announced.images, expected.images)
    assert_equal(rollout.images, expected.images)
    assert rollout.texts.answers == expected.texts.answers
    assert torch.equal(rollout.texts.log_probs, expected.texts.log_probs)


@pytest.mark.parametrize("max_rows", [10, 22])
def test_of_several_waves_each_is_decoded_as_it_ends(policy, prompts, log, small_batches, max_rows):
    engine = RolloutEngine(policy, max_rows=max_rows)
    expected = engine.generate(prompts, 4, PARAMS, seed=7)
    batches = [event for event in log.take() if event != "step"]
    assert batches == [6, 6, 6, 2]
    rollout = engine.generate(prompts, 4, PARAMS, seed=7, on_drawings=log.events.append)
    events = log.take()
    (announced,) = (event for event in events if event != "step" and event not in batches)
    events.remove(announced)
    assert [event for event in events if event != "step"] == batches
    first = events.index(6)
    assert "step" in events[first : events.index(2)]  # there is a wave behind the first batch
    assert_equal(announced.images, expected.images)
    assert_equal(rollout.images, expected.images)


def test_prompts_that_are_drawn_out_of_order(policy, prompts, small_batches):
    """Rows of equal captions are sampled together, so the first batch ends with a later wave."""
    again = [prompts[0], prompts[4], prompts[0], prompts[2], prompts[4]]
    engine, told = RolloutEngine(policy, max_rows=10), []
    expected = engine.generate(again, 3, PARAMS, seed=9)
    rollout = engine.generate(again, 3, PARAMS, seed=9, on_drawings=told.append)
    assert len(told) == 1
    assert_equal(rollout.images, expected.images)


def test_only_drawings_are_announced(policy, prompts):
    engine, told = RolloutEngine(policy), []
    rollout = engine.generate(prompts, 2, PARAMS, answer=False, on_drawings=told.append)
    assert len(told) == 1
    assert_equal(told[0].images, rollout.images)
    engine.generate(prompts, 2, PARAMS, draw=False, on_drawings=told.append)
    engine.generate([], 2, PARAMS, on_drawings=told.append)
    assert len(told) == 1


def test_a_listener_that_fails_leaves_no_trace(policy, prompts):
    engine = RolloutEngine(policy)
    expected = engine.generate(prompts, 4, PARAMS, seed=7)

    def fail(rollout):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, 4, PARAMS, seed=7, on_drawings=fail)
    assert_equal(engine.generate(prompts, 4, PARAMS, seed=7).images, expected.images)


class Stream:
    """A CUDA stream that only says what it is told."""

    current: "Stream"

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_pixels_are_decoded_on_a_stream_that_waits_and_is_waited_for(policy, monkeypatch):
    log = []
    main, side = Stream("main", log), Stream("side", log)
    Stream.current = main

    @contextmanager
    def on(stream):
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    def decode(codes):
        log.append(f"decodes on {Stream.current.name}")
        return torch.zeros(len(codes), 3, IMAGE_SIZE, IMAGE_SIZE)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(policy, "decode_images", decode, raising=False)
    rows = ImageRows(4, NUM_IMAGE_TOKENS, 1, policy.device)
    drawn = Drawings(policy, rows, 4, lambda images: log.append(f"announced on {Stream.current.name}"), side)
    drawn.finish([0, 1])
    log.clear()
    drawn.finish([2, 3])
    assert log == ["side waits for main", "decodes on side", "side waits for main", "announced on side"]
    drawn.samples()
    assert log[4:] == ["main waits for side"] and Stream.current is main
