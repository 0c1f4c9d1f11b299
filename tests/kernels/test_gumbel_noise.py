"""The statistics of counter-based noise."""

import pytest
import torch

from fastcorl_kernels import gumbel_noise


def row_seeds(count):
    return torch.randint(2**32, (count,), generator=torch.Generator().manual_seed(0))


def test_noise_is_a_function_of_seed_step_and_token_alone():
    seeds = row_seeds(5)
    noise = gumbel_noise(seeds, 7, 300)
    assert noise.dtype == torch.float32 and noise.shape == (5, 300)
    assert torch.equal(gumbel_noise(seeds, 7, 300), noise)
    assert torch.equal(gumbel_noise(seeds.flip(0), 7, 300), noise.flip(0))
    assert torch.equal(gumbel_noise(seeds[2:3], 7, 300), noise[2:3])
    assert torch.equal(gumbel_noise(seeds, 7, 1000)[:, :300], noise)
    # Another row, step or token, another noise.
    everything = torch.stack([gumbel_noise(seeds, step, 300) for step in range(20)])
    assert everything.unique().numel() > 0.999 * everything.numel()


def test_noise_has_the_gumbel_distribution_and_no_correlation():
    noise = gumbel_noise(row_seeds(400), 3, 500).double()
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * 1.2825 / count**0.5)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    distance = (uniform - (torch.arange(count) + 0.5) / count).abs().max() * count**0.5
    assert distance < 1.95  # Kolmogorov-Smirnov, p = 0.001
    ranks = torch.exp(-torch.exp(-noise)) - 0.5
    for other in (
        ranks.roll(1, dims=0),  # the next row
        ranks.roll(1, dims=1),  # the next token
        torch.exp(-torch.exp(-gumbel_noise(row_seeds(400), 4, 500).double())) - 0.5,  # the next step
    ):
        assert abs((ranks * other).mean() * 12) < 5 / count**0.5
