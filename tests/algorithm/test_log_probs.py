"""The gate: the log-probs captured while sampling are those of the distribution that is trained."""

import copy

import pytest
import torch

from fastcorl.algorithm import PackOptions, pack_rollout, packed_log_probs
from tests.helpers import (
    NUM_CODES,
    image_hidden,
    image_logits,
    objective_options,
    published_draw_ids,
    published_text_inputs,
    text_logits,
    unconditional_ids,
)

TOLERANCE = 1e-4
POLICIES = ["cond", "cfg", "cfg_detach_uncond"]


def teacher_forced(policy, rollout, options, *, tokens=10_000, image_shift=False, share_prefix=True):
    """Our log-probs of a whole rollout, by modality and in its order, with the captured ones beside them."""
    pack_options = PackOptions(tokens, options.guided, image_shift, share_prefix)
    batches = pack_rollout(rollout, torch.arange(float(rollout.num_rows)), pack_options)
    parts = {"image": {}, "text": {}}
    for batch in batches:
        for modality, log_probs in packed_log_probs(policy, batch, options).items():
            rows = getattr(batch, modality)
            bounds = rows.cu_seqlens.tolist()
            # The advantages above number the rows.
            for row, start, end in zip(rows.advantages.int().tolist(), bounds[:-1], bounds[1:], strict=True):
                assert row not in parts[modality]
                parts[modality][row] = (log_probs[start:end], rows.sampled_log_probs[start:end])
    joined = {
        modality: [torch.cat([found[row][side] for row in range(rollout.num_rows)]) for side in (0, 1)]
        for modality, found in parts.items()
    }
    return joined, len(batches)


def gathered(logits, tokens, temperature):
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def guided_logits(policy, reference, prompt, codes, guidance):
    ids = published_draw_ids(policy, prompt)
    cond = image_logits(reference, ids, codes)
    uncond = image_logits(reference, unconditional_ids(policy, ids), codes)
    return uncond + guidance * (cond - uncond)


@pytest.mark.parametrize("share_prefix", [False, True], ids=["own prompts", "shared prompts"])
@pytest.mark.parametrize("tokens", [100, 10_000], ids=["several packs", "one pack"])
@pytest.mark.parametrize("policy_logits", POLICIES)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_equal_teacher_forced(policy, rollout_of, guidance, temperature, policy_logits, tokens, share_prefix):
    rollout = rollout_of(guidance, temperature)
    options = objective_options(temperature=temperature, guidance=guidance, policy_logits=policy_logits)
    joined, num_batches = teacher_forced(policy, rollout, options, tokens=tokens, share_prefix=share_prefix)
    assert (num_batches == 1) == (tokens == 10_000)
    for ours, sampled in joined.values():
        torch.testing.assert_close(ours, sampled, rtol=0, atol=TOLERANCE)
    captured = rollout.images.cond_log_probs if policy_logits == "cond" else rollout.images.log_probs
    assert torch.equal(joined["image"][1], captured.flatten())
    if guidance != 1:  # the two policies are far from the same
        assert (rollout.images.cond_log_probs - rollout.images.log_probs).abs().mean() > 0.1


@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_equal_those_of_transformers(policy, reference, rollout_of, guidance, temperature):
    rollout = rollout_of(guidance, temperature)
    assert len({len(ids) for ids in rollout.draw_ids}) > 3 and len({len(ids) for ids in rollout.ask_ids}) > 3
    assert len(rollout.texts.lengths.unique()) > 3
    for row in range(rollout.num_rows):
        prompt, codes = rollout.prompt_of(row), rollout.images.tokens[row]
        for weight, captured in ((guidance, rollout.images.log_probs), (1.0, rollout.images.cond_log_probs)):
            logits = guided_logits(policy, reference, prompt, codes, weight)
            expected = gathered(logits, codes, temperature)
            torch.testing.assert_close(captured[row], expected, rtol=0, atol=TOLERANCE)
        answer = rollout.texts.tokens[row, : rollout.texts.lengths[row]]
        logits = text_logits(reference, published_text_inputs(policy, prompt), answer)
        captured = rollout.texts.log_probs[row, : len(answer)]
        torch.testing.assert_close(captured, gathered(logits, answer, temperature), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("policy_logits", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_teacher_forced_equal_those_of_transformers(policy, reference, rollout_of, temperature, policy_logits):
    # Sampled with guidance 1, trained with 5: the log-probs must not come from what was captured.
    rollout = rollout_of(1.0, temperature)
    options = objective_options(temperature=temperature, guidance=5.0, policy_logits=policy_logits)
    joined, _ = teacher_forced(policy, rollout, options, tokens=200)
    images = joined["image"][0].view(rollout.num_rows, -1)
    texts = joined["text"][0].split(rollout.texts.lengths.tolist())
    for row in range(rollout.num_rows):
        prompt, codes = rollout.prompt_of(row), rollout.images.tokens[row]
        logits = guided_logits(policy, reference, prompt, codes, 1.0 if policy_logits == "cond" else 5.0)
        torch.testing.assert_close(images[row], gathered(logits, codes, temperature), rtol=0, atol=TOLERANCE)
        answer = rollout.texts.tokens[row, : rollout.texts.lengths[row]]
        logits = text_logits(reference, published_text_inputs(policy, prompt), answer)
        torch.testing.assert_close(texts[row], gathered(logits, answer, temperature), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("policy_logits", ["cond", "cfg"])
@pytest.mark.parametrize("token", [0, 1, 8, 15])
def test_a_code_has_no_part_in_the_distributions_up_to_its_own(policy, reference, rollout_of, policy_logits, token):
    rollout = copy.deepcopy(rollout_of(5.0, 1.0))
    options = objective_options(guidance=5.0, policy_logits=policy_logits)
    before = teacher_forced(policy, rollout, options)[0]["image"][0].view(rollout.num_rows, -1)
    codes = rollout.images.tokens
    old = codes.clone()
    codes[:, token] = (codes[:, token] + 41) % NUM_CODES
    after = teacher_forced(policy, rollout, options)[0]["image"][0].view(rollout.num_rows, -1)
    torch.testing.assert_close(after[:, :token], before[:, :token], rtol=0, atol=1e-5)
    for row in range(rollout.num_rows):
        weight = 1.0 if policy_logits == "cond" else 5.0
        logits = guided_logits(policy, reference, rollout.prompt_of(row), old[row], weight)
        expected = gathered(logits, codes[row], 1.0)[token]  # another entry of the same distribution
        torch.testing.assert_close(after[row, token], expected, rtol=0, atol=TOLERANCE)
    if token < 15:
        assert (after[:, token + 1] - before[:, token + 1]).abs().max() > 0.1


def test_a_word_has_no_part_in_the_distributions_up_to_its_own(policy, reference, rollout_of):
    rollout = copy.deepcopy(rollout_of(5.0, 1.0))
    lengths = rollout.texts.lengths.tolist()
    before = teacher_forced(policy, rollout, objective_options())[0]["text"][0].split(lengths)
    old = rollout.texts.tokens.clone()
    where = [length // 2 for length in lengths]
    for row, token in enumerate(where):
        rollout.texts.tokens[row, token] = 100 + (old[row, token] + 50) % 100
    after = teacher_forced(policy, rollout, objective_options())[0]["text"][0].split(lengths)
    for row, token in enumerate(where):
        torch.testing.assert_close(after[row][:token], before[row][:token], rtol=0, atol=1e-5)
        inputs = published_text_inputs(policy, rollout.prompt_of(row))
        logits = text_logits(reference, inputs, old[row, : lengths[row]])
        expected = gathered(logits, rollout.texts.tokens[row, : lengths[row]], 1.0)[token]
        torch.testing.assert_close(after[row][token], expected, rtol=0, atol=TOLERANCE)


# The public code's image log-probs


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("tokens", [200, 10_000])
@pytest.mark.parametrize("policy_logits", ["cond", "cfg"])
def test_the_image_shift_is_that_of_the_public_code(policy, reference, rollout_of, policy_logits, tokens, share_prefix):
    rollout = rollout_of(5.0, 1.0)
    options = objective_options(guidance=5.0, policy_logits=policy_logits)
    packing = {"tokens": tokens, "share_prefix": share_prefix}
    shifted, _ = teacher_forced(policy, rollout, options, image_shift=True, **packing)
    ours = shifted["image"][0].view(rollout.num_rows, -1)
    sampled = shifted["image"][1].view(rollout.num_rows, -1)
    assert (ours - sampled).abs().mean() > 0.5
    for row in range(rollout.num_rows):
        # The public code keeps the hidden states of the codes themselves and scores each code with its own.
        ids, codes = published_draw_ids(policy, rollout.prompt_of(row)), rollout.images.tokens[row]
        logits = [
            reference.model.generation_head(image_hidden(reference, prompt_ids, codes)[-len(codes) :])
            for prompt_ids in (ids, unconditional_ids(policy, ids))
        ]
        weight = 1.0 if policy_logits == "cond" else 5.0
        expected = gathered(logits[1] + weight * (logits[0] - logits[1]), codes, 1.0)
        torch.testing.assert_close(ours[row], expected, rtol=0, atol=TOLERANCE)
    # Answers are not shifted, and without the option nothing is.
    torch.testing.assert_close(*shifted["text"], rtol=0, atol=TOLERANCE)
    plain, _ = teacher_forced(policy, rollout, options, **packing)
    torch.testing.assert_close(*plain["image"], rtol=0, atol=TOLERANCE)
