"""Cases that fused losses get wrong, on both backends, against plain torch in float64."""

import pytest
import torch

from fastcorl_kernels import chunking, grpo_loss, linear_grpo_loss, selective_log_softmax

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
IMPORTANCE = ["token", "sequence"]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles here, for CUDA tensors only")
    return request.param


def make_logits(rows=7, vocabulary=37):
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(rows, vocabulary, generator=g), torch.randint(20, vocabulary, (rows,), generator=g)


def loss_and_gradient(logits, ids, backend, **kwargs):
    leaf = logits.clone().requires_grad_()
    bounds = kwargs.pop("cu_seqlens", torch.tensor([0, 3, len(ids)]))
    advantages = kwargs.pop("advantages", torch.tensor([1.0, -2.0]))
    result = grpo_loss(leaf, ids, advantages, cu_seqlens=bounds, backend=backend, **kwargs)
    return result, torch.autograd.grad(result.loss, leaf)[0]


def assert_exact(logits, ids, backend, tolerance=1e-5, **kwargs):
    result, gradient = loss_and_gradient(logits, ids, backend, **kwargs)
    expected, exact = loss_and_gradient(logits.double(), ids, "torch", **kwargs)
    got = {name: None if value is None else value.double() for name, value in vars(result).items()}
    torch.testing.assert_close(got, vars(expected), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), exact, rtol=tolerance, atol=tolerance)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("case", ["first tile forbidden", "drawn token forbidden", "far below 0"])
def test_logits_without_a_foothold(backend, tiling, importance, case):
    logits, ids = make_logits()
    if case == "first tile forbidden":
        logits[:, :20] = -torch.inf
    elif case == "drawn token forbidden":
        logits[2, ids[2]] = -torch.inf
    else:
        logits = logits - 256
    assert_exact(logits, ids, backend, 1e-4, importance=importance)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "cispo"])
def test_a_sequence_that_is_masked_altogether(backend, importance, loss_type):
    logits, ids = make_logits()
    kwargs = {"loss_type": loss_type, "normalizer": 5 if loss_type == "dr_grpo" else None, "importance": importance}
    kwargs |= {"cu_seqlens": torch.tensor([0, 3, 3, 7]), "advantages": torch.tensor([1.0, 3.0, -2.0])}
    assert_exact(logits, ids, backend, mask=torch.arange(7) > 2, **kwargs)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(backend, importance, temperature):
    logits, ids = make_logits()
    logits = (8 * logits).round() / 64
    assert_exact(logits, ids, backend, 1e-4, temperature=temperature, importance=importance)


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_a_vocabulary_that_no_tile_divides(backend, importance):
    logits, ids = make_logits(3, 102401)
    ids[1] = 102400
    assert_exact(logits, ids, backend, cu_seqlens=torch.tensor([0, 1, 3]), importance=importance)


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_a_sequence_of_70000_rows(importance):
    logits, ids = make_logits(70000, 21)
    one = {"advantages": torch.ones(1), "mask": ids == 20, "importance": importance}
    assert_exact(logits, ids, "torch", cu_seqlens=torch.tensor([0, 70000]), **one)


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_operands_of_any_stride(backend, importance):
    g = torch.Generator().manual_seed(0)
    base, head = torch.randn(5, 14, generator=g), torch.randn(5, 37, generator=g)
    ids, advantages = torch.arange(7), torch.tensor([1.0, -2.0])
    kwargs = {"cu_seqlens": torch.tensor([0, 3, 7]), "importance": importance, "backend": backend}
    gradients = []
    for lay_out in (lambda x: x, torch.Tensor.contiguous):
        inputs = [base.clone().requires_grad_(), head.clone().requires_grad_()]
        hidden, weight = lay_out(inputs[0].t()[::2]), lay_out(inputs[1].t())
        loss = linear_grpo_loss(hidden, weight, ids, advantages, **kwargs).loss
        logits = lay_out((inputs[1].t() @ inputs[0])[:, ::2].t())
        loss = loss + grpo_loss(logits, ids, advantages, **kwargs).loss
        gradients.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_guided_logits_in_plain_torch(monkeypatch, importance, masked, rows):
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", rows * 37)
    logits, ids = make_logits()
    c, u = logits.double().requires_grad_(), logits.double().flip(0).requires_grad_()
    with torch.no_grad():
        c[:, 5], u[:, 5] = -torch.inf, -torch.inf
    guided = torch.where(c.isneginf(), -torch.inf, u + 3.0 * (c - u))
    kwargs = {"cu_seqlens": torch.tensor([0, 3, 7]), "mask": ids % 2 == 0 if masked else None, "importance": importance}
    advantages = torch.tensor([1.0, -2.0])
    got = grpo_loss(c, ids, advantages, policy="cfg", uncond=u, guidance=3.0, **kwargs)
    expected = grpo_loss(guided, ids, advantages, **kwargs)
    torch.testing.assert_close(vars(got), vars(expected))
    for one, other in zip(*(torch.autograd.grad(result.loss, (c, u)) for result in (got, expected)), strict=True):
        torch.testing.assert_close(one, other.nan_to_num(0.0))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_importance_ratios_in_plain_torch(importance, per_row):
    logits, ids = make_logits()
    ratios = torch.tensor([0.5, 2.0])
    rows = ratios.repeat_interleave(torch.tensor([3, 4]))
    got = loss_and_gradient(logits, ids, "torch", importance=importance, importance_ratios=rows if per_row else ratios)
    expected = loss_and_gradient(logits, ids, "torch", importance=importance, advantages=torch.tensor([0.5, -4.0]))
    torch.testing.assert_close((vars(got[0]), got[1]), (vars(expected[0]), expected[1]))


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_two_runs_agree_bit_for_bit(importance):
    logits, ids = make_logits(700, 3001)
    runs = [loss_and_gradient(logits, ids, "torch", importance=importance) for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("temperature", [0.7, "per row"])
@pytest.mark.parametrize("entropy", [False, True])
def test_what_a_small_forward_keeps_changes_no_gradient(monkeypatch, entropy, temperature):
    logits, ids = make_logits()
    logits[:, 3] = -torch.inf
    logits = logits.double().requires_grad_()
    temperature = torch.linspace(0.5, 2.0, 7) if temperature == "per row" else temperature

    def gradients():
        outputs = selective_log_softmax(logits, ids, temperature=temperature, return_entropy=entropy)
        log_probs = outputs[0] if entropy else outputs
        upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
        return [torch.autograd.grad(log_probs, logits, upstream, retain_graph=True)[0] for _ in range(2)]

    kept = gradients()
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 2 * 37)
    torch.testing.assert_close(kept, gradients())
    assert torch.equal(*kept)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float32_sum_of_products(triton_device, dtype, first):
    """On the CPU, as on old GPUs, torch has no product of 16-bit operands into a float32 sum."""
    from fastcorl_kernels.triton_sources import add_product, mixes_types

    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, n, generator=g).to(dtype).to(triton_device) for n in (37, 5))
    total = torch.randn(37, 5, generator=g).to(triton_device)
    expected = left.double().t() @ right.double() + (0.0 if first else total.double())
    add_product(total, left.t(), right, first)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
    assert triton_device == "cuda" or not mixes_types(torch.device("cpu"))
