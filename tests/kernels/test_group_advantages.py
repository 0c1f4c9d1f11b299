import statistics

import pytest
import torch

from fastcorl_kernels import group_advantages


def by_hand(rewards, group_size, scale="std", eps=1e-4):
    out = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        deviation = statistics.stdev(group) + eps if scale == "std" else 1.0
        out += [(r - statistics.mean(group)) / deviation for r in group]
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_matches_the_formula(group_size, scale):
    rewards = torch.randn(group_size * 4, dtype=torch.float64, generator=torch.Generator().manual_seed(group_size))
    got = group_advantages(rewards, group_size, scale=scale)
    torch.testing.assert_close(got, by_hand(rewards.tolist(), group_size, scale))
    low = group_advantages(rewards.float(), group_size, scale=scale)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1e-30, 12345.678, -3.3])
@pytest.mark.parametrize("mode", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [3, 6, 7])
def test_a_constant_group_is_exactly_zero(value, mode, dtype, group_size):
    rewards = torch.tensor([value] * group_size + [n**2 for n in range(group_size)], dtype=dtype)
    got = group_advantages(rewards, group_size, mode=mode)
    assert got[:group_size].eq(0).all() and got[group_size:].ne(0).all()


def test_eight_times_a_tenth_is_exactly_zero():
    assert group_advantages(torch.full((8,), 0.1), 8).eq(0).all()


def test_a_group_of_one_is_zero():
    assert group_advantages(torch.tensor([3.0, -1.0]), 1).eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_left_out_of_its_group(bad):
    got = group_advantages(torch.tensor([1.0, bad, 2.0, 4.0, 5.0, 6.0, 7.0, 9.0]), 4)
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2, 3]], group_advantages(torch.tensor([1.0, 2.0, 4.0]), 3))
    torch.testing.assert_close(got[4:], group_advantages(torch.tensor([5.0, 6.0, 7.0, 9.0]), 4))


def test_groups_with_one_or_no_finite_reward_are_zero():
    nan = float("nan")
    assert group_advantages(torch.tensor([1.0, nan, nan, nan, 2.0, 2.0]), 2).eq(0).all()


def test_mean_far_above_the_spread():
    rewards = 1000 + 0.02 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        group_advantages(rewards, 8).double(), by_hand(rewards.tolist(), 8), rtol=1e-5, atol=1e-5
    )


def test_weighted_columns_are_summed_before_normalisation():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    got = group_advantages(rewards, 3, weights=torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(got, group_advantages(torch.tensor([2.0, 1.0, 2.5]), 3))


def test_a_column_of_weight_zero_does_not_count():
    rewards = torch.tensor([[1.0, float("nan")], [2.0, float("inf")], [4.0, 0.0]])
    for mode in ("sum_then_normalize", "normalize_then_sum"):
        got = group_advantages(rewards, 3, weights=[1.0, 0.0], mode=mode)
        torch.testing.assert_close(got, group_advantages(rewards[:, 0], 3, mode=mode))


def test_gdpo_normalises_each_column_then_the_batch():
    rewards = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    summed = sum(w * by_hand(rewards[:, i].tolist(), 4) for i, w in enumerate((1.0, 0.5)))
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    got = group_advantages(rewards, 4, weights=(1.0, 0.5), mode="normalize_then_sum")
    torch.testing.assert_close(got, expected)


def test_gdpo_keeps_apart_what_the_sum_confuses():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 1.0]])
    summed = group_advantages(rewards, 4)
    decoupled = group_advantages(rewards, 4, mode="normalize_then_sum")
    assert summed[2] == summed[3] and decoupled[2] != decoupled[3]


def test_integer_and_empty_rewards():
    got = group_advantages(torch.tensor([0, 1, 1, 1]), 2)
    assert got.dtype == torch.float32 and got[2:].eq(0).all()
    assert group_advantages(torch.zeros(0), 4).shape == (0,)
    assert group_advantages(torch.zeros(0, 2), 4, mode="normalize_then_sum").shape == (0,)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("rewards", {"rewards": torch.zeros(7)}),
        ("rewards", {"rewards": torch.zeros(2, 2, 2)}),
        ("rewards", {"rewards": [1.0, 2.0]}),
        ("group_size", {"group_size": 0}),
        ("group_size", {"group_size": 2.0}),
        ("weights", {"weights": [1.0, 2.0]}),
        ("mode", {"mode": "sum"}),
        ("scale", {"scale": "batch"}),
        ("eps", {"eps": -1.0}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(name, kwargs):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        group_advantages(**({"rewards": torch.zeros(8), "group_size": 4} | kwargs))
