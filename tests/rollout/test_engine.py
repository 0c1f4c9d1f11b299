"""Rollouts against transformers' text generation and Janus's published image sampling."""

from dataclasses import replace

import pytest
import torch

from fastcorl.model import load_policy, save_policy
from fastcorl.rollout import RolloutEngine, SamplingParams, row_seed
from fastcorl.rollout.worker import PolicyWorker
from fastcorl_kernels import gumbel_noise
from tests.helpers import (
    IMAGE_SIZE,
    NUM_IMAGE_TOKENS,
    make_policy,
    published_draw_ids,
    published_text_inputs,
    text_logits,
    unconditional_ids,
)

LIMIT = 24


@pytest.fixture(scope="module", params=["grouped", "paged"])
def engine(policy, request):
    return RolloutEngine(policy, cache=request.param)


def assert_same_images(ours, theirs):
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.cond_log_probs, theirs.cond_log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.pixels, theirs.pixels, rtol=0, atol=1e-4)


def assert_same_texts(ours, theirs):
    assert ours.answers == theirs.answers
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.finished, theirs.finished)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-4)


# Answers


def check_greedy_answers(engine, policy, reference, prompts, limit):
    """Returns the lengths of the answers, one per prompt."""
    texts = engine.generate(prompts, 2, SamplingParams(0.0, 1.0, limit), draw=False).texts
    pad, end = policy.processor.tokenizer.pad_token_id, policy.encoder.eos_id
    for row in range(2 * len(prompts)):
        inputs = published_text_inputs(policy, prompts[row // 2])
        generated = reference.generate(**inputs, do_sample=False, max_new_tokens=limit, eos_token_id=end)[0]
        expected = generated[inputs["input_ids"].shape[1] :].tolist()
        length = int(texts.lengths[row])
        assert texts.tokens[row, :length].tolist() == expected
        assert (texts.tokens[row, length:] == pad).all()
        assert not texts.log_probs[row, length:].any()
        assert bool(texts.finished[row]) == (expected[-1] == end)
        assert texts.answers[row] == policy.processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert texts.tokens.shape[1] == texts.lengths.max()
    return texts.lengths[::2].tolist()


def test_greedy_answers_are_those_of_transformers(engine, policy, reference, prompts):
    lengths = check_greedy_answers(engine, policy, reference, prompts, LIMIT)
    # The weights are such that some answers end early and at different times, and one reaches the limit.
    early = sorted({length for length in lengths if length < LIMIT})
    assert LIMIT in lengths and len(early) >= 3, lengths
    # A limit just before, at and just behind the end of an answer.
    middle = early[len(early) // 2]
    for limit in (1, middle - 1, middle, middle + 1):
        check_greedy_answers(engine, policy, reference, prompts, limit)


def test_answers_may_end_with_their_first_token(engine, policy, reference, prompts, monkeypatch):
    texts = engine.generate(prompts, 1, SamplingParams(0.0, 1.0, 1), draw=False).texts
    assert len(texts.tokens.unique()) == 1  # the weights are such that all begin alike
    monkeypatch.setattr(policy.encoder, "eos_id", int(texts.tokens[0, 0]))
    assert set(check_greedy_answers(engine, policy, reference, prompts, LIMIT)) == {1}
    # The drawings go on without them; codes of the same number end nothing.
    both = engine.generate(prompts, 2, SamplingParams(0.0, 5.0, LIMIT))
    drawn = engine.generate(prompts, 2, SamplingParams(0.0, 5.0, LIMIT), answer=False)
    assert both.texts.finished.all() and both.texts.tokens.shape == (2 * len(prompts), 1)
    assert_same_images(both.images, drawn.images)


def test_sampled_answers_end_at_the_end_token_or_the_limit(engine, policy, prompts):
    texts = engine.generate(prompts, 8, SamplingParams(1.0, 1.0, LIMIT), draw=False, seed=3).texts
    assert len(texts.lengths.unique()) > 5
    for tokens, length, finished in zip(texts.tokens, texts.lengths, texts.finished, strict=True):
        ends = (tokens[:length] == policy.encoder.eos_id).nonzero().flatten().tolist()
        assert ends == ([length - 1] if finished else [])
        assert finished or length == LIMIT


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_answers_are_drawn_from_transformers_logits(engine, policy, reference, prompts, temperature):
    texts = engine.generate(prompts, 2, SamplingParams(temperature, 1.0, LIMIT), seed=("run", 4)).texts
    for row in range(2 * len(prompts)):
        prompt, answer = prompts[row // 2], texts.tokens[row, : texts.lengths[row]]
        logits = text_logits(reference, published_text_inputs(policy, prompt), answer) / temperature
        seed = torch.tensor([row_seed(("run", 4), prompt.id, row % 2, "text")])
        noise = torch.cat([gumbel_noise(seed, step, logits.shape[1]) for step in range(len(answer))])
        assert torch.equal((logits + noise).argmax(-1), answer)


# Drawings


@torch.no_grad()
def published_sampling(policy, reference, prompt, parallel, weight, temperature, seed=None):
    """Janus's published sampling of `parallel` drawings of one prompt: a conditional and an unconditional row of each,
    interleaved, transformers' cache, greedy or with the engine's noise."""
    prompt_ids = published_draw_ids(policy, prompt)
    tokens = prompt_ids.repeat(2 * parallel, 1)
    for row in range(2 * parallel):
        if row % 2:
            tokens[row] = unconditional_ids(policy, prompt_ids)
    embeds, cache = reference.get_input_embeddings()(tokens), None
    drawn = torch.zeros(parallel, NUM_IMAGE_TOKENS, dtype=torch.int64)
    for step in range(NUM_IMAGE_TOKENS):
        outputs = reference.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits = reference.model.generation_head(outputs.last_hidden_state[:, -1])
        cond, uncond = logits[0::2], logits[1::2]
        logits = uncond + weight * (cond - uncond)
        if temperature:
            seeds = torch.tensor([row_seed(seed, prompt.id, index, "image") for index in range(parallel)])
            logits = logits / temperature + gumbel_noise(seeds, step, logits.shape[1])
        drawn[:, step] = logits.argmax(-1)
        both = drawn[:, step].repeat_interleave(2)
        embeds = reference.prepare_embeddings_for_image_generation(both)[:, None]
    return drawn


@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_drawings_are_those_of_the_published_sampling(engine, policy, reference, prompts, guidance, temperature):
    params = SamplingParams(temperature, guidance, LIMIT)
    images = engine.generate(prompts, 3, params, answer=False, seed=("run", 4)).images
    assert images.tokens.shape == (3 * len(prompts), NUM_IMAGE_TOKENS)
    for index, prompt in enumerate(prompts):
        expected = published_sampling(policy, reference, prompt, 3, guidance, temperature, ("run", 4))
        assert torch.equal(images.tokens[3 * index : 3 * index + 3], expected)
    if temperature:
        assert len(images.tokens.unique(dim=0)) == len(images.tokens)


def test_greedy_drawings_are_those_of_transformers(engine, policy, reference, prompts):
    images = engine.generate(prompts, 1, SamplingParams(0.0, 5.0, LIMIT), answer=False).images
    for row, prompt in enumerate(prompts):
        ids = published_draw_ids(policy, prompt)[None]
        theirs = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
            guidance_scale=5.0,
            max_length=ids.shape[1] + NUM_IMAGE_TOKENS,
        )
        assert torch.equal(images.tokens[row], theirs[0])


def test_the_log_probs_of_guidance_one_are_the_conditional_ones(engine, prompts):
    images = engine.generate(prompts, 2, SamplingParams(0.8, 1.0, LIMIT), answer=False).images
    assert torch.equal(images.log_probs, images.cond_log_probs)
    images = engine.generate(prompts, 2, SamplingParams(0.8, 1.0 + 1e-6, LIMIT), answer=False).images
    torch.testing.assert_close(images.log_probs, images.cond_log_probs, rtol=0, atol=1e-4)


# Together


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("limit", [5, NUM_IMAGE_TOKENS - 1, NUM_IMAGE_TOKENS, NUM_IMAGE_TOKENS + 1, LIMIT])
def test_drawings_and_answers_together_are_those_of_each_alone(engine, prompts, guidance, temperature, limit):
    params = SamplingParams(temperature, guidance, limit)
    both = engine.generate(prompts, 3, params, seed=6)
    drawn = engine.generate(prompts, 3, params, answer=False, seed=6)
    answered = engine.generate(prompts, 3, params, draw=False, seed=6)
    assert_same_images(both.images, drawn.images)
    assert_same_texts(both.texts, answered.texts)
    assert drawn.texts is None and answered.images is None
    assert drawn.vision_features is None and drawn.ask_ids == [] and answered.draw_ids == answered.uncond_ids == []
    torch.testing.assert_close(both.vision_features, answered.vision_features)
    assert (both.draw_ids, both.uncond_ids, both.ask_ids) == (drawn.draw_ids, drawn.uncond_ids, answered.ask_ids)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_row_does_not_depend_on_its_neighbours(engine, prompts, guidance):
    params = SamplingParams(1.0, guidance, LIMIT)
    whole = engine.generate(prompts, 4, params, seed=7)
    assert len(whole.images.tokens.unique(dim=0)) == 4 * len(prompts)  # rows of a group differ

    def check(chosen, group_size):
        part = engine.generate([prompts[index] for index in chosen], group_size, params, seed=7)
        rows = [4 * index + k for index in chosen for k in range(group_size)]
        assert torch.equal(part.images.tokens, whole.images.tokens[rows])
        torch.testing.assert_close(part.images.log_probs, whole.images.log_probs[rows], rtol=0, atol=1e-4)
        assert part.texts.answers == [whole.texts.answers[row] for row in rows]
        assert torch.equal(part.texts.lengths, whole.texts.lengths[rows])
        longest = part.texts.tokens.shape[1]
        assert torch.equal(part.texts.tokens, whole.texts.tokens[rows, :longest])
        torch.testing.assert_close(part.texts.log_probs, whole.texts.log_probs[rows, :longest], rtol=0, atol=1e-4)
        assert [part.prompt_of(row).id for row in range(part.num_rows)] == [
            prompts[index].id for index in chosen for _ in range(group_size)
        ]

    check([4, 3, 2, 1, 0], 4)  # another order
    check([0, 2, 4], 4)  # split over two ranks
    check([1, 3], 4)
    check([0, 1, 2, 3, 4], 1)  # smaller groups
    check([3], 2)


def test_the_seed_identifies_the_call(engine, prompts):
    params = SamplingParams(1.0, 5.0, LIMIT)
    first, again, other = (engine.generate(prompts, 2, params, seed=seed) for seed in [(0, 1), (0, 1), (0, 2)])
    assert torch.equal(first.images.log_probs, again.images.log_probs)
    assert torch.equal(first.texts.log_probs, again.texts.log_probs)
    assert not torch.equal(first.images.tokens, other.images.tokens)
    assert first.texts.answers != other.texts.answers


def test_prompts_of_one_length_and_repeated_prompts(engine, prompts):
    params = SamplingParams(1.0, 5.0, LIMIT)
    once = engine.generate(prompts[:1], 2, params, seed=8)
    twice = engine.generate(prompts[:1] * 2, 2, params, seed=8)
    # The same id draws the same noise.
    assert torch.equal(twice.images.tokens, once.images.tokens.repeat(2, 1))
    assert torch.equal(twice.texts.tokens, once.texts.tokens.repeat(2, 1))


@pytest.mark.parametrize("draw", [True, False])
@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_nothing_to_do(engine, prompts, draw, answer, guidance):
    params = SamplingParams(1.0, guidance, LIMIT)
    rollout = engine.generate([], 4, params, draw=draw, answer=answer)
    assert rollout.num_rows == 0
    assert (rollout.images is not None) == draw and (rollout.texts is not None) == answer
    if draw:
        assert rollout.images.tokens.shape == rollout.images.log_probs.shape == (0, NUM_IMAGE_TOKENS)
        assert rollout.images.pixels.shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
    if answer:
        assert rollout.texts.tokens.shape == (0, 0) and rollout.texts.answers == []
    if not draw and not answer:
        rollout = engine.generate(prompts, 4, params, draw=False, answer=False)
        assert rollout.num_rows == 4 * len(prompts) and rollout.images is None and rollout.texts is None


def test_an_empty_question_is_answered(engine, policy, reference, prompts):
    empty = [replace(prompts[0], question="", caption="")]
    rollout = engine.generate(empty, 2, SamplingParams(0.0, 5.0, LIMIT))
    check_greedy_answers(engine, policy, reference, empty, LIMIT)
    assert rollout.images.tokens.shape == (2, NUM_IMAGE_TOKENS)


def test_both_rows_of_a_drawing_are_fed_the_same_tokens(engine, prompts, monkeypatch):
    fed = []
    step = PolicyWorker.step
    monkeypatch.setattr(
        PolicyWorker,
        "step",
        lambda worker: fed.append(worker.images.tokens[:, : worker.images.count].clone()) or step(worker),
    )
    images = engine.generate(prompts, 2, SamplingParams(1.0, 5.0, LIMIT), answer=False).images
    assert len(fed) == NUM_IMAGE_TOKENS - 1
    for index, tokens in enumerate(fed):
        assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], images.tokens[:, index])


@pytest.mark.parametrize("truncation", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.8}])
def test_truncation_restricts_what_is_drawn_and_no_log_prob(engine, prompts, truncation):
    params = SamplingParams(1.0, 5.0, LIMIT, **truncation)
    rollout = engine.generate(prompts, 4, params, seed=3)
    whole = engine.generate(prompts, 4, SamplingParams(1.0, 5.0, LIMIT), seed=3)
    assert not torch.equal(rollout.images.tokens, whole.images.tokens)
    # Likelier tokens on the whole, under the same distribution at the first token, which all rows of a prompt share.
    assert rollout.images.log_probs.mean() > whole.images.log_probs.mean()
    if "top_k" in truncation and "top_p" not in truncation:
        for row in range(0, 4 * len(prompts), 4):
            assert len(rollout.images.tokens[row : row + 4, 0].unique()) <= 3


def test_what_a_rollout_holds(engine, policy, prompts):
    rollout = engine.generate(prompts, 2, SamplingParams(1.0, 5.0, LIMIT))
    count = 2 * len(prompts)
    assert rollout.images.pixels.shape == (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(rollout.images.pixels, policy.decode_images(rollout.images.tokens))
    assert rollout.vision_features.shape == (len(prompts), NUM_IMAGE_TOKENS, 64)
    for prompt, draw, uncond, ask in zip(prompts, rollout.draw_ids, rollout.uncond_ids, rollout.ask_ids, strict=True):
        ids = published_draw_ids(policy, prompt)
        assert draw == ids.tolist() and uncond == unconditional_ids(policy, ids).tolist()
        assert ask == published_text_inputs(policy, prompt)["input_ids"][0].tolist()
    tensors = [*vars(rollout.images).values(), rollout.texts.tokens, rollout.texts.log_probs]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_generating_leaves_no_trace(engine, policy, prompts):
    flags = [parameter.requires_grad for parameter in policy.parameters()]
    modes = [module.training for module in policy.modules()]
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    state = torch.get_rng_state()
    engine.generate(prompts, 2, SamplingParams(1.0, 5.0, LIMIT))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert flags == [parameter.requires_grad for parameter in policy.parameters()]
    assert modes == [module.training for module in policy.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_an_update_of_the_weights_is_seen_at_once(prompts, tmp_path):
    policy = make_policy()
    engine = RolloutEngine(policy)
    params = SamplingParams(1.0, 5.0, LIMIT)
    before = engine.generate(prompts, 2, params, seed=1)
    with torch.no_grad():
        for parameter in policy.backbone.parameters():
            parameter.mul_(1.1)
    after = engine.generate(prompts, 2, params, seed=1)
    assert not torch.equal(before.images.tokens, after.images.tokens)
    save_policy(policy, tmp_path)
    fresh = RolloutEngine(load_policy(tmp_path)).generate(prompts, 2, params, seed=1)
    assert_same_images(after.images, fresh.images)
    assert_same_texts(after.texts, fresh.texts)
