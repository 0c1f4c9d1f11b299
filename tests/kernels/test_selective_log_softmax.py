import pytest
import torch

from fastcorl_kernels import selective_log_softmax


def problem(n=6, v=9, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, dtype=dtype, generator=g), torch.randint(0, v, (n,), generator=g)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 13)])
def test_matches_the_definition(shape, temperature):
    logits, index = problem(*shape)
    log_probs, entropy = selective_log_softmax(logits, index, temperature=temperature, return_entropy=True)
    for i in range(shape[0]):
        p = torch.distributions.Categorical(logits=logits[i] / temperature)
        torch.testing.assert_close(log_probs[i], p.log_prob(index[i]))
        torch.testing.assert_close(entropy[i], p.entropy())


def test_gradients():
    logits, index = problem(4, 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: selective_log_softmax(x, index, temperature=0.7, return_entropy=True), logits
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_low_precision_logits_accumulate_in_float32(dtype, tolerance):
    logits, index = problem(5, 301)
    logits = logits.to(dtype)
    got = selective_log_softmax(logits, index)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), selective_log_softmax(logits.double(), index), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vocabulary_that_is_partly_forbidden(dtype):
    logits, index = problem(4, 4000, dtype)
    logits[:, :3000] = float("-inf")
    index = index % 1000 + 3000
    logits.requires_grad_()
    log_probs, entropy = selective_log_softmax(logits, index, return_entropy=True)
    (log_probs + entropy).sum().backward()
    alone = logits.detach()[:, 3000:].clone().requires_grad_()
    expected, expected_entropy = selective_log_softmax(alone, index - 3000, return_entropy=True)
    (expected + expected_entropy).sum().backward()
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert logits.grad[:, :3000].eq(0).all()
    torch.testing.assert_close(logits.grad[:, 3000:], alone.grad)


def test_a_forbidden_token_has_log_prob_minus_infinity_and_a_finite_gradient():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0]], requires_grad=True)
    log_prob = selective_log_softmax(logits, torch.tensor([0]))
    assert log_prob.item() == float("-inf")
    log_prob.backward()
    assert logits.grad.isfinite().all()


def test_strongly_negative_and_strongly_positive_logits():
    for shift in (-1e4, 1e4):
        logits, index = problem(3, 8, torch.float32)
        log_probs, entropy = selective_log_softmax(logits * 0.5 + shift, index, return_entropy=True)
        assert log_probs.isfinite().all() and log_probs.max() < 0 and entropy.min() > 0


def test_strided_logits_and_int32_index():
    logits, index = problem(8, 10)
    wide = torch.randn(8, 2, 10, dtype=torch.float64)
    wide[:, 1] = logits
    got = selective_log_softmax(wide[:, 1], index.int())
    assert torch.equal(got, selective_log_softmax(logits, index))


def test_no_rows():
    assert selective_log_softmax(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_without_gradients():
    logits, index = problem()
    with torch.inference_mode():
        assert torch.equal(selective_log_softmax(logits, index), selective_log_softmax(logits.clone(), index))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("logits", {"logits": torch.zeros(2, 3, 4)}),
        ("logits", {"logits": torch.zeros(6, 9, dtype=torch.long)}),
        ("index", {"index": torch.zeros(5, dtype=torch.long)}),
        ("index", {"index": torch.zeros(6)}),
        ("index", {"index": torch.full((6,), 9)}),
        ("index", {"index": torch.full((6,), -1)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(name, kwargs):
    logits, index = problem()
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        selective_log_softmax(**({"logits": logits, "index": index} | kwargs))
