import pytest
import torch

from fastcorl.algorithm.merge import gaussian_merge, linear_merge, merge_state_dicts, ties_merge


def test_an_example_by_hand():
    base = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    first = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 10])  # mean 1, standard deviation sqrt(10)
    second = torch.tensor([0.0, 0, 0, 0, 0, 0, 4, 4, 6, 6])  # mean 2, standard deviation sqrt(64 / 9) = 2.667
    # Entries within 2 * 2.667 of (1 + 2) / 2, that is in (-3.833, 6.833), count half.
    expected = base + torch.tensor([0.0, 0, 0, 0, 0, 0, 2, 2, 3, 3 + 10])
    merged = gaussian_merge(base, base + first, base + second)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(gaussian_merge(base, base + second, base + first), expected)
    # One standard deviation: (-1.167, 4.167); the sixes of the second count whole too.
    narrow = gaussian_merge(base, base + first, base + second, width=1.0)
    torch.testing.assert_close(narrow, base + torch.tensor([0.0, 0, 0, 0, 0, 0, 2, 2, 6, 16]))
    # Wide enough for all: the average.
    wide = gaussian_merge(base, base + first, base + second, width=100.0)
    torch.testing.assert_close(wide, base + (first + second) / 2)


def test_equal_updates():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 40, generator=generator)
    update = torch.rand(50, 40, generator=generator) - 0.5  # uniform: nothing is two standard deviations out
    torch.testing.assert_close(gaussian_merge(base, base + update, base + update), base + update)
    # What stands out counts whole for each, so twice: the method takes the two for different tasks.
    update[7, 7] = 9.0
    merged = gaussian_merge(base, base + update, base + update)
    update[7, 7] *= 2
    torch.testing.assert_close(merged, base + update)


def test_no_update():
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gaussian_merge(base, base, base), base)
    # One model learnt nothing: its width is 0, so the other counts whole.
    first = base + torch.linspace(-1, 1, 30).view(6, 5)
    torch.testing.assert_close(gaussian_merge(base, first, base), first)


@pytest.mark.parametrize("shape", [(), (1,), (0,)])
def test_tensors_without_a_spread_are_averaged(shape):
    base = torch.full(shape, 1.0)
    merged = gaussian_merge(base, base + 2, base + 4)
    assert merged.shape == shape and (merged == 4).all()


def test_types_are_kept_and_the_computation_is_not_done_in_them():
    generator = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(64, generator=generator).bfloat16() for _ in range(3))
    merged = gaussian_merge(base, first, second)
    assert merged.dtype == torch.bfloat16
    expected = gaussian_merge(base.double(), first.double(), second.double())
    assert torch.equal(merged, expected.bfloat16())


def test_state_dicts():
    base = {"weight": torch.zeros(4), "count": torch.tensor([3])}
    first = {"weight": torch.tensor([1.0, -1.0, 1.0, -1.0]), "count": torch.tensor([5])}
    second = {"weight": torch.tensor([-1.0, 1.0, 1.0, -1.0]), "count": torch.tensor([7])}
    merged = merge_state_dicts(base, first, second)
    assert merged.keys() == base.keys()
    assert torch.equal(merged["weight"], torch.tensor([0.0, 0.0, 1.0, -1.0]))
    assert torch.equal(merged["count"], base["count"])  # integers are counters, not weights


@pytest.mark.parametrize("missing", range(3))
def test_state_dicts_of_different_models(missing):
    states = [{"a": torch.zeros(2), "b": torch.zeros(2)} for _ in range(3)]
    del states[missing]["b"]
    with pytest.raises(ValueError, match="first that differs: b"):
        merge_state_dicts(*states)


def test_two_policies(policy):
    base = policy.janus.state_dict()
    merged = merge_state_dicts(base, base, base)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in base.items())


def test_linear_is_the_mean():
    base, tuned = (
        torch.zeros(3),
        [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 2, 5])],
    )
    torch.testing.assert_close(linear_merge(base, *tuned), torch.tensor([2.0, 2.0, 3.0]))


def test_ties_by_hand():
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    first = torch.tensor([4.0, -3.0, 0.1, 0.0])
    second = torch.tensor([2.0, 5.0, 0.0, 0.2])
    # Half of each is kept: (4, -3) and (2, 5); signs elected +, +; the second entry keeps only the 5.
    merged = ties_merge(base, base + first, base + second, density=0.5)
    torch.testing.assert_close(merged, base + torch.tensor([3.0, 5.0, 0.0, 0.0]))
    # All kept: the small ones stand alone, so count whole.
    whole = ties_merge(base, base + first, base + second, density=1.0)
    torch.testing.assert_close(whole, base + torch.tensor([3.0, 5.0, 0.1, 0.2]))


def test_ties_agrees_with_pefts():
    from peft.utils.merge_utils import ties as peft_ties

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    updates = [torch.randn(40, 30, generator=generator) for _ in range(3)]
    merged = ties_merge(base, *(base + update for update in updates), density=0.3)
    expected = base + peft_ties(updates, weights=torch.ones(3), density=0.3, majority_sign_method="total")
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_more_than_two_state_dicts(method):
    base = {"weight": torch.zeros(4)}
    tuned = [{"weight": torch.full((4,), value)} for value in (1.0, 2.0, 6.0)]
    merged = merge_state_dicts(base, *tuned, method=method, density=1.0)
    torch.testing.assert_close(merged["weight"], torch.full((4,), 3.0))
    with pytest.raises(ValueError, match="takes two"):
        merge_state_dicts(base, *tuned)


def test_shapes_that_differ():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match="first that differs: b"):
        merge_state_dicts(base, base, {"a": torch.zeros(2), "b": torch.zeros(3)})
