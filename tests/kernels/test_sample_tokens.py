"""Sampling against a float64 restatement that sorts; the noise against its hash in plain integers."""

import math

import pytest
import torch

from fastcorl_kernels import gumbel_noise, sample_tokens
from fastcorl_kernels.sampling import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # in values that are not selected
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRUNCATIONS = [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.6}]


def make_rows(count, vocabulary, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, uncond = ((3 * torch.randn(count, vocabulary, generator=g)).to(dtype).to(device) for _ in range(2))
    return logits, uncond, torch.randint(2**32, (count,), generator=g).to(device)


def random_bits(seeds, steps, num_tokens):
    """The hash, in int64."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    rows = mix(mix(seeds + 0x9E3779B9 & 0xFFFFFFFF) + steps & 0xFFFFFFFF)[:, None]
    return mix(mix(rows + torch.arange(num_tokens) & 0xFFFFFFFF) ^ rows)


def truncate(row, top_k, top_p):
    """One row of scores, -inf where it is not drawn from; what equals the last that is kept is kept."""
    if top_k is not None:
        row = row.masked_fill(row < row.sort(descending=True).values[:top_k][-1], -torch.inf)
    if top_p is not None:
        ranked = row.sort(descending=True).values
        shares = ranked.softmax(-1)
        row = row.masked_fill(row < ranked[shares.cumsum(0) - shares < top_p][-1], -torch.inf)
    return row


def exact_sample(logits, seeds, steps, uncond=None, guidance=1.0, temperature=1.0, top_k=None, top_p=None):
    cond = logits.double() / (temperature or 1.0)
    scores = cond
    if uncond is not None:
        uncond = uncond.double() / (temperature or 1.0)
        scores = uncond + guidance * (cond - uncond)
    log_p = scores.log_softmax(-1)
    if temperature:
        scores = torch.stack([truncate(row, top_k, top_p) for row in scores])
        scores = scores + gumbel_noise(seeds, steps, logits.shape[1]).double()
    tokens = scores.argmax(-1)
    return tokens, *(p.gather(-1, tokens[:, None])[:, 0] for p in (log_p, cond.log_softmax(-1)))


def assert_same(got, expected):
    assert torch.equal(got[0].cpu(), expected[0].cpu()) and got[0].dtype == torch.int64
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double().cpu(), other.double().cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0, 0])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_against_sorting(monkeypatch, dtype, guidance, temperature, truncation):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * 383)
    logits, uncond, seeds = make_rows(40, 383, dtype)
    options = {"temperature": temperature, **truncation}
    if guidance is not None:
        options |= {"uncond": uncond, "guidance": guidance}
    got = sample_tokens(logits, seeds, 3, backend="torch", **options)
    assert_same(got, exact_sample(logits.float(), seeds, 3, **options))
    assert (got.cond_log_probs is got.log_probs) == (guidance is None)


@pytest.mark.parametrize("steps", [0, 7, 2**32 - 1, "per row"])
def test_the_noise_against_its_hash(monkeypatch, steps):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 3000)
    _, _, seeds = make_rows(9, 1)
    seeds[:3] = torch.tensor([0, 2**31, 2**32 - 1])
    if steps == "per row":
        steps = torch.arange(9) * 2**29
    bits = random_bits(seeds, steps, 1000)
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    noise = gumbel_noise(seeds, steps, 1000)
    assert torch.equal(noise, -torch.log(-torch.log1p(-uniform)))
    assert torch.equal(gumbel_noise(seeds[4:6], steps if isinstance(steps, int) else steps[4:6], 77), noise[4:6, :77])


@pytest.mark.parametrize("bits", [0x00000000, 0x00000003, 0xFFFFFFC6])
def test_the_noise_at_its_ends(triton_device, bits):
    """The largest uniforms would round to 1 and the smallest to 0; a lone token must still get a finite noise."""
    seed, step, token = {0x3: (31, 53, 9300), 0xFFFFFFC6: (62, 47, 11384), 0: (0, 0, 0)}[bits]
    seeds = torch.tensor([seed])
    if bits:
        assert random_bits(seeds, step, token + 1)[0, token] == bits
    noise = gumbel_noise(seeds, step, 16384)
    assert noise.isfinite().all() and noise.min() > -3 and noise.max() < 23
    # The logit that makes the token win or lose by 1e-4 tells Triton's noise.
    for margin in (-1e-4, 1e-4):
        logits = torch.full((1, token + 2), -torch.inf)
        logits[0, token + 1], logits[0, token] = noise[0, token] - noise[0, token + 1], margin
        drawn = sample_tokens(logits.to(triton_device), seeds.to(triton_device), step, backend="triton").tokens
        assert drawn.item() == (token if margin > 0 else token + 1)


@pytest.fixture(params=["whole rows", "tiles"])
def tile(request, triton_device, monkeypatch):
    """Rows in one tile, or in several, the last of them partly outside of the row."""
    from fastcorl_kernels.sampling import triton_kernels

    if request.param == "tiles":
        monkeypatch.setattr(triton_kernels, "MAX_TILE", 256)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0}, *TRUNCATIONS[1:]], ids=str)
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [1, 7, 383, 1000])
def test_triton_equals_the_reference(triton_device, vocabulary, guidance, options):
    logits, uncond, seeds = make_rows(3, vocabulary, device=triton_device)
    if guidance is not None:
        options = {**options, "uncond": uncond, "guidance": guidance}
    got = sample_tokens(logits, seeds, 2**32 - 1, backend="triton", **options)
    assert_same(got, sample_tokens(logits, seeds, 2**32 - 1, backend="torch", **options))
    assert (got.cond_log_probs is got.log_probs) == (guidance is None)


@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize("view", ["row stride", "column stride", "transposed"])
def test_triton_on_views_with_steps_per_row(triton_device, dtype, view):
    views = {
        "row stride": lambda x: x[::2, :-1],
        "column stride": lambda x: x[:6, ::2],
        "transposed": lambda x: x.reshape(90, 12).t()[:6],
    }
    logits, uncond, seeds = make_rows(12, 90, dtype, triton_device)
    logits, uncond = views[view](logits), views[view](uncond)
    steps = torch.arange(12, device=triton_device)[::2]
    options = {"uncond": uncond, "guidance": 2.0, "top_p": 0.9}
    got = sample_tokens(logits, seeds[::2], steps, backend="triton", **options)
    assert_same(got, exact_sample(logits.cpu(), seeds[::2].cpu(), steps.cpu(), **options | {"uncond": uncond.cpu()}))
    lone = sample_tokens(logits[2:3], seeds[4:5], 4, backend="triton", **options | {"uncond": uncond[2:3]})
    assert_same(lone, [part[2:3] for part in got])


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("allowed", [slice(256, 300), slice(5, 6), slice(299, 300), slice(0, 300, 7)])
def test_forbidden_tokens(triton_device, backend, allowed, guided, truncation):
    logits, uncond, seeds = make_rows(4, 300, device=triton_device)
    forbidden = torch.ones(300, dtype=torch.bool, device=triton_device)
    forbidden[allowed] = False
    logits[:, forbidden] = -torch.inf
    options = truncation
    if guided:
        uncond[:, forbidden] = -torch.inf
        options = {**truncation, "uncond": uncond, "guidance": 5.0}
    got = sample_tokens(logits, seeds, 1, backend=backend, **options)
    # Among the others alone the noise would be another one, so only their log-probs are compared.
    assert not forbidden[got.tokens].any()
    plain = logits[:, ~forbidden] if not guided else uncond[:, ~forbidden]
    if guided:
        plain = plain + 5.0 * (logits[:, ~forbidden] - plain)
    place = forbidden.logical_not().cumsum(0)[got.tokens][:, None] - 1
    for log_probs, each in ((got.log_probs, plain), (got.cond_log_probs, logits[:, ~forbidden])):
        torch.testing.assert_close(log_probs, each.log_softmax(-1).gather(1, place)[:, 0], rtol=1e-5, atol=1e-5)


def test_a_row_without_a_finite_logit_gives_an_id_of_the_vocabulary(triton_device, backend):
    logits, _, seeds = make_rows(2, 20, device=triton_device)
    logits[0] = -torch.inf
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}):
        assert sample_tokens(logits, seeds, 0, backend=backend, **options).tokens[0] == 0


def test_greedy_takes_the_first_of_equals(triton_device, backend, tile):
    logits = torch.zeros(2, 600, device=triton_device)
    logits[0, 299:], logits[1, 17::100] = 1, 2
    got = sample_tokens(
        logits, torch.zeros(2, dtype=torch.long, device=triton_device), 0, temperature=0, backend=backend
    )
    assert got.tokens.tolist() == [299, 17]
    torch.testing.assert_close(got.log_probs, logits.log_softmax(-1).amax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top_k", "kept"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 5)])
def test_equals_of_the_last_are_kept(triton_device, backend, top_k, kept):
    logits = torch.tensor([0.0, -1.0, 0.5, -0.0, 0.5, -4.0], device=triton_device).expand(40, 6)
    seeds = torch.arange(40, device=triton_device)
    tokens = sample_tokens(logits, seeds, 0, top_k=top_k, temperature=100.0, backend=backend).tokens
    assert tokens.unique().tolist() == sorted([2, 4, 0, 3, 1][:kept])


def test_what_truncation_leaves_alone(triton_device, backend):
    logits, _, seeds = make_rows(6, 50, device=triton_device)

    def sample(**options):
        return sample_tokens(logits, seeds, 2, backend=backend, **options)

    plain = sample()
    for options in ({"top_p": 1}, {"top_k": 50}, {"top_k": 10**9, "top_p": 1.0}):
        assert_same(sample(**options), plain)
    greedy = sample(temperature=0, top_k=2, top_p=0.1)
    assert torch.equal(greedy.tokens, logits.argmax(-1))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}):
        assert_same(sample(**options), greedy)
    assert torch.equal(sample(temperature=1e-6).tokens, greedy.tokens)
    assert not torch.equal(plain.tokens, greedy.tokens)


def test_two_runs_are_equal(triton_device, backend):
    logits, uncond, seeds = make_rows(3, 300, device=triton_device)
    runs = [sample_tokens(logits, seeds, 2, uncond=uncond, guidance=2, top_p=0.9, backend=backend) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_tokens_out(triton_device, backend):
    logits, _, seeds = make_rows(4, 30, device=triton_device)
    base = torch.full((3, 8, 5), -1, device=triton_device)
    for out in (base[0, :4, 0], base[0, ::2, 1], base[:2, 4:, 2], base[::2, :4, 3], base[:0, :4, 4]):
        untouched = base.clone()
        tokens = sample_tokens(logits, seeds, 5, tokens_out=out, backend=backend).tokens
        assert torch.equal(out, tokens.expand_as(out))
        assert (base != untouched).sum() == out.numel()
        base.fill_(-1)


def test_no_rows(triton_device, backend):
    logits, _, seeds = make_rows(0, 5, device=triton_device)
    got = sample_tokens(logits, seeds, 0, uncond=logits, top_k=2, tokens_out=seeds, backend=backend)
    assert all(part.shape == (0,) for part in got)


def test_the_result_can_be_used_in_training_and_the_noise_leaves_torchs_generator_alone():
    logits, _, seeds = make_rows(3, 9)
    logits.requires_grad_()
    before = torch.get_rng_state()
    got = sample_tokens(logits, seeds, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not got.log_probs.requires_grad
    scale = torch.ones(3, requires_grad=True)
    (got.log_probs * scale * gumbel_noise(seeds, 0, 1)[:, 0]).sum().backward()
    assert scale.grad.isfinite().all()


def chi_square_p(counts, expected):
    """The probability of counts at least this far from their expectation; sparse cells are merged."""
    order = expected.argsort()
    counts, expected = counts[order], expected[order]
    cell = (expected.cumsum(0) / 20).floor().long().clamp(max=int(expected.sum() / 20) - 1)
    merged = [torch.zeros(int(cell.max()) + 1).double().index_add(0, cell, each) for each in (counts, expected)]
    kept = merged[1] > 0
    statistic = ((merged[0] - merged[1]).square() / merged[1])[kept].sum()
    return torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2).item()


@pytest.mark.parametrize("vary", ["seed", "step"])
@pytest.mark.parametrize(("vocabulary", "draws"), [(384, 20000), (16384, 2000), (102400, 1000)])
def test_samples_follow_the_softmax(vocabulary, draws, vary):
    logits = 2.5 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    _, _, seeds = make_rows(draws, 1)
    numbers = torch.arange(draws)
    seeds, steps = (seeds, 11) if vary == "seed" else (seeds[:1].expand(draws), numbers)
    tokens = sample_tokens(logits.expand(draws, -1), seeds, steps, temperature=0.8).tokens
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert chi_square_p(counts, draws * (logits.double() / 0.8).softmax(0)) > 0.001
    assert chi_square_p(counts, draws * (logits.double() / 1.1).softmax(0)) < 0.001


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", torch.zeros(3)),
        ("logits", torch.zeros(3, 0)),
        ("seeds", torch.zeros(2, dtype=torch.long)),
        ("seeds", torch.zeros(3)),
        ("steps", -1),
        ("steps", 1.5),
        ("steps", torch.zeros(2, dtype=torch.long)),
        ("uncond", torch.zeros(3, 4)),
        ("guidance", -1.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("tokens_out", torch.zeros(3)),
        ("tokens_out", torch.zeros(3, 1, dtype=torch.long)),
        ("backend", "cuda"),
    ],
)
def test_bad_arguments(name, value):
    arguments = {"logits": torch.zeros(3, 5), "seeds": torch.zeros(3, dtype=torch.long), "steps": 0} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample_tokens(**arguments)


def test_bad_arguments_of_the_noise():
    seeds = torch.zeros(3, dtype=torch.long)
    for name, arguments in (("seeds", (seeds.float(), 0, 5)), ("steps", (seeds, -1, 5)), ("num_tokens", (seeds, 0, 0))):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            gumbel_noise(*arguments)
