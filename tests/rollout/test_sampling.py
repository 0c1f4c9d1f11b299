import pytest
import torch

from fastcorl.rollout import gumbel_noise, row_seed, sample


def row_seeds(count, first=0):
    return torch.tensor([row_seed("test", first + index) for index in range(count)])


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


def test_noise_does_not_touch_torchs_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(torch.zeros(2, 9), row_seeds(2), 0, 1.0)
    assert torch.equal(torch.rand(3), expected)


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


@pytest.mark.parametrize(
    ("seed", "step", "token", "low", "high"),
    [
        (62, 47, 11384, -2.9, -2.7),  # the 32 random bits are 0xffffffc6, which rounds to 1 in float32
        (31, 53, 9300, 20.0, 23.0),  # they are 0x00000003
        (0, 0, 0, -3.0, 10.0),  # the plainest key of all
    ],
)
def test_noise_is_finite_at_its_ends(seed, step, token, low, high):
    noise = gumbel_noise(torch.tensor([seed]), step, 16384)
    assert noise.isfinite().all()
    assert low < noise[0, token] < high


def chi_square_p(counts, expected):
    """The probability of counts at least this far from their expectation; sparse cells are merged."""
    order = expected.argsort()
    counts, expected = counts[order], expected[order]
    cell = (expected.cumsum(0) / 20).floor().long().clamp(max=int(expected.sum() / 20) - 1)
    merged = [torch.zeros(int(cell.max()) + 1).double().index_add(0, cell, each) for each in (counts, expected)]
    kept = merged[1] > 0
    statistic = ((merged[0] - merged[1]).square() / merged[1])[kept].sum()
    return torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2).item()


def test_the_chi_square_test_notices_a_shift():
    expected = torch.full((50,), 100.0).double()
    counts = torch.poisson(expected, generator=torch.Generator().manual_seed(0))
    assert chi_square_p(counts * expected.sum() / counts.sum(), expected) > 0.001
    counts[:10] *= 1.5
    assert chi_square_p(counts * expected.sum() / counts.sum(), expected) < 1e-6


@pytest.mark.parametrize("vary", ["seed", "step"])
@pytest.mark.parametrize(
    ("vocabulary", "draws", "temperature"), [(384, 20000, 1.0), (384, 20000, 0.6), (16384, 2000, 1.0)]
)
def test_samples_follow_the_softmax(vocabulary, draws, temperature, vary):
    logits = 2.5 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    if vary == "seed":
        parts = [sample(logits.expand(len(s), -1), s, 11, temperature)[0] for s in row_seeds(draws).split(100)]
    else:
        seeds = row_seeds(100)
        steps = range(draws // 100)
        parts = [sample(logits.expand(100, -1), seeds, step, temperature)[0] for step in steps]
    counts = torch.bincount(torch.cat(parts), minlength=vocabulary).double()
    expected = draws * (logits.double() / temperature).softmax(0)
    assert chi_square_p(counts, expected) > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probs_are_those_of_the_tempered_distribution(temperature, dtype):
    logits = (4 * torch.randn(50, 384, generator=torch.Generator().manual_seed(0))).to(dtype)
    tokens, log_probs = sample(logits, row_seeds(50), 2, temperature)
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert tokens.dtype == torch.int64 and log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-5)


def test_greedy_is_the_limit_of_a_low_temperature():
    logits = torch.randn(50, 384, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits, row_seeds(50), 0, 0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).max(-1).values)
    assert torch.equal(sample(logits, row_seeds(50), 0, 1e-6)[0], tokens)
    assert not torch.equal(sample(logits, row_seeds(50), 0, 1.0)[0], tokens)


def test_row_seeds():
    seeds = [row_seed(*parts) for parts in [(0, "a", 1, "image"), (0, "a", 1, "text"), (0, "a", 2, "image"), (1, "a")]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    # Written down: a change of the hash would change every run.
    assert row_seed(0, "a", 1, "image") == 1251028823


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((2000, 4), -torch.inf)
    logits[:, 2] = 0
    tokens, log_probs = sample(logits, row_seeds(2000), 0, 1.0)
    assert (tokens == 2).all() and not log_probs.any()
