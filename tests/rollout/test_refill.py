"""Limited rows and pages: requests wait, ended answers make room, and nothing of it shows in what is sampled."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.rollout import RolloutEngine, SamplingParams, decoding, prefill
from fastcorl.rollout.graphs import bucket
from fastcorl.rollout.prefill import Prefill
from fastcorl.rollout.requests import text_requests
from fastcorl.rollout.room import PAGE, Room
from fastcorl.rollout.worker import PolicyWorker
from tests.helpers import NUM_IMAGE_TOKENS

PARAMS = SamplingParams(1.0, 5.0, 24)


@pytest.fixture(scope="module")
def whole(policy, prompts):
    """Everything at once."""
    return RolloutEngine(policy).generate(prompts, 4, PARAMS, seed=7)


def assert_same(ours, theirs):
    for name in ("images", "texts"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.images.cond_log_probs, theirs.images.cond_log_probs, rtol=0, atol=1e-4)
    assert ours.texts.answers == theirs.texts.answers
    assert torch.equal(ours.texts.lengths, theirs.texts.lengths)
    assert torch.equal(ours.texts.finished, theirs.texts.finished)


class Watch:
    """Row numbers of every step."""

    def __init__(self, monkeypatch):
        self.rows = []
        step = PolicyWorker.step

        def watched(worker):
            self.rows.append((worker.images.count, worker.texts.count))
            step(worker)

        monkeypatch.setattr(PolicyWorker, "step", watched)


@pytest.mark.parametrize("cache", ["grouped", "paged"])
@pytest.mark.parametrize("max_rows", [2, 3, 7, 16, 50])
def test_tokens_do_not_depend_on_the_number_of_rows(policy, prompts, whole, cache, max_rows, monkeypatch):
    watch = Watch(monkeypatch)
    engine = RolloutEngine(policy, cache=cache, max_rows=max_rows)
    assert_same(engine.generate(prompts, 4, PARAMS, seed=7), whole)
    assert max(2 * images + texts for images, texts in watch.rows) <= max_rows
    assert any(2 * images + texts >= max_rows - 1 for images, texts in watch.rows)


@pytest.mark.parametrize("cache", ["grouped", "paged"])
@pytest.mark.parametrize("tokens", [240, 500, 1600])
def test_tokens_do_not_depend_on_the_pages(policy, prompts, whole, cache, tokens):
    engine = RolloutEngine(policy, cache=cache, kv_cache_tokens=tokens)
    for _ in range(2):  # all pages have come back
        assert_same(engine.generate(prompts, 4, PARAMS, seed=7), whole)


@pytest.mark.parametrize("max_rows", [None, 5, 23])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_rounded_numbers_of_rows_change_nothing(policy, prompts, whole, max_rows, count, monkeypatch):
    """What CUDA graphs need: rows that fill up a batch, and buffers that serve call after call."""
    watch = Watch(monkeypatch)
    engine = RolloutEngine(policy, cache="paged", graphs=True, max_rows=max_rows)
    expected = RolloutEngine(policy).generate(prompts[:count], 4, PARAMS, seed=7)
    assert_same(engine.generate(prompts, 4, PARAMS, seed=7), whole)
    worker = engine._worker
    assert_same(engine.generate(prompts[:count], 4, PARAMS, seed=7), expected)
    assert_same(engine.generate(prompts, 4, PARAMS, seed=7), whole)
    assert engine._worker is worker and worker.graphs is not None
    other = replace(PARAMS, temperature=0.9)  # as many rows, but another step to capture
    engine.generate(prompts[:count], 4, other, seed=7)
    assert engine._worker is not worker and engine._worker.sizes.texts == bucket(4 * count)
    assert any(bucket(texts) > texts for _, texts in watch.rows)


def test_buckets():
    assert [bucket(count) for count in (0, 1, 3, 16, 17, 100, 256, 257, 1000)] == [0, 1, 4, 16, 24, 128, 256, 320, 1024]
    assert all(bucket(count) >= count for count in range(2000))
    assert len({bucket(count) for count in range(257)}) <= 16


@pytest.mark.parametrize("check_every", [1, 2, 3, 100])
@pytest.mark.parametrize("cache", ["grouped", "paged"])
def test_tokens_do_not_depend_on_when_the_host_looks(policy, prompts, whole, cache, check_every, monkeypatch):
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", check_every)
    assert_same(RolloutEngine(policy, cache=cache).generate(prompts, 4, PARAMS, seed=7), whole)
    assert_same(RolloutEngine(policy, cache=cache, max_rows=9).generate(prompts, 4, PARAMS, seed=7), whole)


def test_ended_answers_make_room_at_once(policy, prompts, monkeypatch):
    watch = Watch(monkeypatch)
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", 1)
    engine = RolloutEngine(policy, max_rows=6)
    texts = engine.generate(prompts, 8, PARAMS, draw=False, seed=1).texts
    busy = [count for _, count in watch.rows]
    assert max(busy) == 6
    # All six rows are kept busy until the last answers drain, and no step is spent on nobody.
    assert sum(busy) == int((texts.lengths - 1).sum())
    assert all(count == 6 for count in busy[: -PARAMS.max_new_tokens])


def test_drawings_and_answers_of_one_prompt_have_a_prompt_each(policy, prompts):
    requests = text_requests(prompts[:2], [[1, 2, 3], [1, 2, 3]], 2, 0)
    # The same question about two images is two prompts, about one image it is one.
    assert [request.prompt for request in requests] == [0, 0, 1, 1]
    again = text_requests([prompts[0]] * 2, [[1, 2, 3], [1, 2, 3]], 2, 0)
    assert [request.prompt for request in again] == [0, 0, 0, 0]


@pytest.mark.parametrize("cache", ["grouped", "paged"])
def test_progress_is_told(policy, prompts, cache):
    engine, told = RolloutEngine(policy, cache=cache), []
    for _ in range(2):  # also where an earlier call has left its lengths
        told.clear()
        rollout = engine.generate(prompts, 2, PARAMS, progress=told.append)
        assert told == sorted(told) and len(told) > 4
        assert told[-1] == rollout.images.tokens.numel() + int(rollout.texts.lengths.sum())


# Requests that can never fit


@pytest.mark.parametrize(
    ("limits", "params", "message"),
    [
        ({"max_rows": 1}, PARAMS, "a drawing takes 2 rows; rollout.max_rows is 1: raise it"),
        ({"kv_cache_tokens": 64}, PARAMS, "a drawing takes .* tokens of KV cache .* rollout.kv_cache_tokens allows 64"),
        ({}, SamplingParams(1.0, 1.0, 500), "an answer of 500 tokens after a prompt of .* context is 512 tokens"),
    ],
)
def test_what_never_fits_is_refused_before_anything_runs(policy, prompts, limits, params, message, monkeypatch):
    watch = Watch(monkeypatch)
    engine = RolloutEngine(policy, **limits)
    monkeypatch.setattr(type(policy), "vision_features", None)
    with pytest.raises(UserError, match=message):
        engine.generate(prompts, 2, params)
    assert not watch.rows


def test_a_drawing_beyond_the_context_is_refused(policy, prompts):
    engine = RolloutEngine(policy)
    engine.context = 20
    with pytest.raises(UserError, match=f"a drawing of {NUM_IMAGE_TOKENS} tokens after a prompt of"):
        engine.generate(prompts, 1, PARAMS, answer=False)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"guidance": -0.5}, {"max_new_tokens": 0}, {"top_k": 0}, {"top_p": 1.5}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingParams(**settings)


@pytest.mark.parametrize("cache", ["grouped", "paged"])
@pytest.mark.parametrize("limits", [{"max_rows": 5}, *({"kv_cache_tokens": tokens} for tokens in range(300, 700, 50))])
def test_repeated_prompts_share_their_pages(policy, prompts, cache, limits):
    again = [prompts[0], prompts[4], prompts[0], prompts[2], prompts[4]]
    params = SamplingParams(1.0, 5.0, 24)
    expected = RolloutEngine(policy).generate(again, 3, params, seed=9)
    assert_same(RolloutEngine(policy, cache=cache, **limits).generate(again, 3, params, seed=9), expected)


@pytest.mark.parametrize("cache", ["grouped", "paged"])
def test_a_failed_call_leaves_no_trace(policy, prompts, whole, cache, monkeypatch):
    engine = RolloutEngine(policy, cache=cache, max_rows=20)
    step, calls = PolicyWorker.step, []

    def failing(worker):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        step(worker)

    monkeypatch.setattr(PolicyWorker, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, 4, PARAMS, seed=7)
    assert_same(engine.generate(prompts, 4, PARAMS, seed=7), whole)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_worker_is_freed_when_it_is_replaced(policy, prompts, graphs):
    """Its pool may be half of a GPU's memory."""
    engine = RolloutEngine(policy, cache="paged", graphs=graphs)
    engine.generate(prompts, 2, PARAMS)
    first = weakref.ref(engine._worker.cache)
    gc.disable()
    try:
        engine.generate(prompts, 2, replace(PARAMS, temperature=0.5))
        assert first() is None
        second = weakref.ref(engine._worker.cache)
        del engine
        assert second() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("cache", ["grouped", "paged"])
def test_calls_of_both_kinds_in_turn_share_a_worker(policy, prompts, whole, cache):
    engine, workers = RolloutEngine(policy, cache=cache), set()
    for turn in range(6):
        rollout = engine.generate(prompts, 4, PARAMS, draw=turn % 2 == 0, answer=turn % 2 == 1, seed=7)
        if turn % 2:
            assert torch.equal(rollout.texts.tokens, whole.texts.tokens)
        else:
            assert torch.equal(rollout.images.tokens, whole.images.tokens)
        if turn > 0:
            workers.add(engine._worker)
    assert len(workers) == 1


def test_an_unknown_cache_is_refused(policy):
    with pytest.raises(ValueError, match="cache must be 'paged', 'grouped' or None, got 'gruoped'"):
        RolloutEngine(policy, cache="gruoped")


@pytest.mark.parametrize("max_rows", [None, 6])
@pytest.mark.parametrize("cache", ["grouped", "paged"])
def test_prompts_are_dropped_once_the_cache_has_them(policy, prompts, cache, max_rows, monkeypatch):
    held = []
    step = PolicyWorker.step

    def watched(worker):
        held.append(sum(bool(source.prefill.keys) for source in worker.prefilled.values()))
        assert max_rows or not any(each.keys for each in made)
        step(worker)

    made = []
    monkeypatch.setattr(PolicyWorker, "step", watched)
    monkeypatch.setattr(prefill, "Prefill", lambda *args: made.append(Prefill(*args)) or made[-1])
    engine = RolloutEngine(policy, cache=cache, max_rows=max_rows)
    engine.generate(prompts, 4, replace(PARAMS, guidance=1.0))
    assert len(held) > 10 and max(held) <= (2 if max_rows else 0)
    assert not any(each.keys for each in made) and not engine._worker.prefilled


# Counting


def test_room_counts_shared_pages_once():
    room = Room(None, None)
    prompt = [("a", 2 * PAGE + 3)]
    assert room.take(prompt, 20) and room.take(prompt, 20)
    assert (room.rows, room.pages) == (2, 2 + 2 * 2)  # 23 tokens of its own are 2 pages
    assert room.take([("b", PAGE - 1)], 1) and (room.rows, room.pages) == (3, 7)
    room.give(prompt, 20)
    assert (room.rows, room.pages) == (2, 5)
    room.give(prompt, 20)
    room.give([("b", PAGE - 1)], 1)
    assert (room.rows, room.pages) == (0, 0)


def test_room_takes_all_or_nothing():
    room = Room(3, 5)
    pair = [("cond", 0), ("uncond", 0)]
    assert room.take(pair, PAGE)
    assert not room.take(pair, PAGE) and (room.rows, room.pages) == (2, 2)  # a row too many
    assert not room.take([("x", 3 * PAGE)], PAGE) and (room.rows, room.pages) == (2, 2)  # a page too many
    assert room.take([("x", 2 * PAGE)], PAGE) and (room.rows, room.pages) == (3, 5)


def test_memory_is_what_the_formula_says(policy, prompts):
    """Keys and values of 24 image tokens... of every row, its prompt's rest, and each prompt's whole pages once."""
    engine = RolloutEngine(policy, cache="paged")
    rollout = engine.generate(prompts, 4, PARAMS)
    cache = engine._worker.cache
    tokens = 0
    for ids in rollout.draw_ids:
        tokens += 4 * 2 * (len(ids) + NUM_IMAGE_TOKENS - 1)
    for ids in rollout.ask_ids:
        tokens += (len(ids) - 1) + 4 * PARAMS.max_new_tokens
    page_bytes = engine.geometry.page_bytes(PAGE)
    held = sum(page.nbytes for page in (*cache.key_pages, *cache.value_pages))
    needed = tokens / PAGE * page_bytes
    # Each of the 60 rows rounds up to whole pages of 16 tokens, and one page belongs to nobody.
    assert needed <= held <= needed + (60 + 1) * page_bytes
