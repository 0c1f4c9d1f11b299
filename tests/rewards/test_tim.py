import math

import pytest
import torch

from fastcorl.rewards import TIMReward, match_score


def cosine(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def score_by_loops(image, text):
    image_to_text = [max(cosine(i, t) for t in text) for i in image]
    text_to_image = [max(cosine(i, t) for i in image) for t in text]
    return (sum(image_to_text) / len(image) + sum(text_to_image) / len(text)) / 2


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(4, 5, 3, generator=generator), torch.randn(4, 6, 3, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4])[:, None]
    return image, text, mask


def test_score_equals_loops(states):
    image, text, mask = states
    expected = [score_by_loops(image[row].tolist(), text[row][mask[row]].tolist()) for row in range(4)]
    score = match_score(image, text, mask)
    torch.testing.assert_close(score, torch.tensor(expected))
    assert (score.abs() <= 1).all()


@pytest.mark.parametrize("garbage", [1e6, math.nan, math.inf])
def test_masked_text_does_not_exist(states, garbage):
    image, text, mask = states
    expected = match_score(image, text, mask)
    text[~mask] = garbage
    assert torch.equal(match_score(image, text, mask), expected)


def test_same_direction_is_1_and_opposite_is_minus_1():
    image = torch.ones(2, 3, 4)
    text = torch.stack([torch.full((2, 4), 7.0), torch.full((2, 4), -0.1)])
    torch.testing.assert_close(match_score(image, text, torch.ones(2, 2).bool()), torch.tensor([1.0, -1.0]))


def test_a_row_without_text_or_with_nan_states_is_a_nan_alone(states):
    image, text, mask = states
    mask[1] = False
    image[2, 0] = math.nan
    assert match_score(image, text, mask).isnan().tolist() == [False, True, True, False]


def test_half_precision_states_are_scored_in_float32(states):
    image, text, mask = states
    score = match_score(image.bfloat16(), text.bfloat16(), mask)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, match_score(image, text, mask), atol=0.01, rtol=0)


def test_reward_asks_for_all_rows_at_once_with_their_own_captions(policy, make_rollout):
    rollout, calls = make_rollout(group_size=3), []
    match_states = policy.match_states
    policy.match_states = lambda pixels, captions: calls.append(captions) or match_states(pixels, captions)
    reward = TIMReward(policy)(rollout)
    assert calls == [[rollout.prompts[0].caption] * 3 + [rollout.prompts[1].caption] * 3]
    for row in range(6):
        image, text, mask = match_states(rollout.images.pixels[row : row + 1], [rollout.prompt_of(row).caption])
        expected = score_by_loops(image[0].tolist(), text[mask].tolist())
        assert reward[row].item() == pytest.approx(expected, abs=1e-5)
