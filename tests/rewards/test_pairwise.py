import random

import pytest
import torch

from fastcorl.rewards.users.pairwise import group_pairs, win_rates

NAN = float("nan")


def rates_by_loops(probabilities, pairs, num_rows):
    beats = {}
    for (i, j), probability in zip(pairs, probabilities, strict=True):
        if probability is not None:
            beats[i, j], beats[j, i] = probability, 1 - probability
    result = []
    for row in range(num_rows):
        won = [probability for (i, _), probability in beats.items() if i == row]
        result.append(sum(won) / len(won) if won else NAN)
    return result


def test_pairs_stay_in_their_group():
    assert group_pairs(2, 3) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    assert group_pairs(3, 1) == []
    pairs = group_pairs(16, 16)
    assert len(pairs) == len(set(pairs)) == 16 * 120
    assert all(i < j and i // 16 == j // 16 for i, j in pairs)


def test_rates_by_hand():
    rates = win_rates(torch.tensor([1.0, 0.5, 0.25]), [(0, 1), (0, 2), (1, 2)], 3)
    assert rates.tolist() == [0.75, 0.125, 0.625]
    assert rates.dtype == torch.float32


@pytest.mark.parametrize("unjudged", [0.0, 0.3, 0.9, 1.0])
def test_rates_equal_loops(unjudged):
    rng = random.Random(1)
    pairs = group_pairs(4, 5)
    probabilities = [None if rng.random() < unjudged else rng.random() for _ in pairs]
    given = torch.tensor([NAN if p is None else p for p in probabilities])
    rates = win_rates(given, pairs, 20)
    torch.testing.assert_close(rates, torch.tensor(rates_by_loops(probabilities, pairs, 20)), equal_nan=True)
    judged = rates[~rates.isnan()]
    assert ((judged >= 0) & (judged <= 1)).all()


def test_a_full_tournament_is_zero_sum():
    pairs = group_pairs(3, 8)
    rates = win_rates(torch.rand(len(pairs), generator=torch.Generator().manual_seed(0)), pairs, 24)
    torch.testing.assert_close(rates.view(3, 8).mean(dim=1), torch.full((3,), 0.5))


def test_groups_of_one_have_no_rate():
    assert win_rates(torch.empty(0), [], 2).isnan().all()
