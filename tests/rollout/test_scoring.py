"""Requests that sample nothing: hidden states of given sequences."""

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.rollout import RolloutEngine, SamplingParams, prefill
from tests.helpers import HIDDEN_SIZE, IMAGE_SIZE, NUM_IMAGE_TOKENS, published_text_inputs


@pytest.fixture(scope="module")
def engine(policy):
    return RolloutEngine(policy)


@pytest.mark.parametrize("pack_tokens", [1, 60, 10_000])
def test_hidden_states_are_those_of_transformers(engine, policy, reference, prompts, pack_tokens, monkeypatch):
    monkeypatch.setattr(prefill, "PACK_TOKENS", pack_tokens)
    sequences, features, expected = [], [], []
    for prompt in prompts:
        for inputs in (
            published_text_inputs(policy, prompt),
            {"input_ids": torch.tensor([[40 + len(sequences), 9, 8]])},
        ):
            sequences.append(inputs["input_ids"][0].tolist())
            pixels = inputs.get("pixel_values")
            features.append(None if pixels is None else policy.vision_features(pixels)[0])
            with torch.no_grad():
                expected.append(reference.model(**inputs).last_hidden_state[0])
    states = engine.hidden_states(sequences, features)
    assert len(states) == len(sequences)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert engine.hidden_states([]) == []
    with pytest.raises(UserError, match="a sequence of 513 tokens is to be scored; the model's context is 512"):
        engine.hidden_states([[7] * 513])


def test_log_probs_of_an_answer_follow_from_its_hidden_states(engine, policy, prompts):
    texts = engine.generate(prompts, 1, SamplingParams(1.0, 1.0, 12), draw=False).texts
    for row, prompt in enumerate(prompts):
        answer = texts.tokens[row, : texts.lengths[row]]
        ids = policy.encoder.ask(prompt.question)
        features = policy.vision_features(policy.preprocess([prompt.image]))[0]
        (states,) = engine.hidden_states([ids + answer.tolist()], [features])
        with torch.no_grad():
            log_probs = policy.text_head(states[len(ids) - 1 : -1]).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(log_probs, texts.log_probs[row, : len(answer)], rtol=0, atol=1e-4)


def test_match_states_of_a_batch_equal_those_one_by_one(engine, policy, reference, prompts):
    captions = [prompt.caption for prompt in prompts]
    captions[3] = captions[0]  # the same caption twice
    pixels = torch.rand(len(captions), 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    images, texts, mask = engine.match_states(pixels, captions)
    assert images.shape == (len(captions), NUM_IMAGE_TOKENS, HIDDEN_SIZE)
    tokenizer, processor = policy.processor.tokenizer, policy.processor
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    for row, caption in enumerate(captions):
        caption_ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, policy.encoder.begin_image_id]
        ids += [policy.encoder.image_id] * NUM_IMAGE_TOKENS
        ids += tokenizer.convert_tokens_to_ids([processor.image_end_token]) + caption_ids
        with torch.no_grad():
            hidden = reference.model(
                input_ids=torch.tensor([ids]), pixel_values=((pixels[row] - mean) / std)[None]
            ).last_hidden_state[0]
        torch.testing.assert_close(images[row], hidden[2 : 2 + NUM_IMAGE_TOKENS], rtol=0, atol=1e-5)
        assert mask[row].sum() == len(caption_ids)
        torch.testing.assert_close(texts[row][mask[row]], hidden[-len(caption_ids) :], rtol=0, atol=1e-5)
        assert not texts[row][~mask[row]].any()
        one = engine.match_states(pixels[row : row + 1], [caption])
        torch.testing.assert_close(one[0][0], images[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(one[1][0], texts[row][mask[row]], rtol=0, atol=1e-5)


def test_match_states_resizes_drawings(engine):
    pixels = torch.rand(2, 3, 4 * IMAGE_SIZE, 4 * IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    images, _, _ = engine.match_states(pixels, ["a red 3", "5"])
    assert images.shape == (2, NUM_IMAGE_TOKENS, HIDDEN_SIZE) and images.isfinite().all()
