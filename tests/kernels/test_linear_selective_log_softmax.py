import pytest
import torch

from fastcorl_kernels import linear_selective_log_softmax
from fastcorl_kernels.linear_log_softmax.reference import linear_selective_log_softmax_reference


def problem(n=7, h=5, v=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((n, h), (v, h), (v,))]
    hidden, weight, bias = (t.to(dtype).requires_grad_() for t in tensors)
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=g)


def gradients(result, inputs):
    outputs = result if isinstance(result, tuple) else (result,)
    upstream = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype) + i for i, o in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 11), (6, 3, 2)])
def test_matches_the_reference(set_chunk_rows, shape, with_bias, entropy, temperature, chunk):
    hidden, weight, bias, index = problem(*shape)
    set_chunk_rows(chunk, shape[2])
    bias = bias if with_bias else None
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    got = linear_selective_log_softmax(
        hidden, weight, index, bias=bias, temperature=temperature, return_entropy=entropy
    )
    expected = linear_selective_log_softmax_reference(hidden, weight, index, bias, temperature, entropy)
    torch.testing.assert_close(got, expected)
    for one, other in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck(set_chunk_rows):
    hidden, weight, bias, index = problem(4, 3, 5)
    set_chunk_rows(2, 5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_selective_log_softmax(h, w, index, bias=b, temperature=1.3, return_entropy=True),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision(set_chunk_rows, dtype, tolerance):
    hidden, weight, bias, index = problem(9, 6, 40, dtype)
    set_chunk_rows(4, 40)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    got = linear_selective_log_softmax(hidden, weight, index, bias=bias)
    expected = linear_selective_log_softmax_reference(exact[0], exact[1], index, exact[2])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(got, (hidden, weight, bias)), gradients(expected, exact), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_a_vocabulary_that_is_partly_forbidden(set_chunk_rows):
    hidden, weight, _, index = problem(5, 3, 8, torch.float32)
    set_chunk_rows(2, 8)
    bias = torch.tensor([float("-inf")] * 4 + [0.0] * 4)
    log_probs, entropy = linear_selective_log_softmax(
        hidden, weight, index % 4 + 4, bias=bias, temperature=0.5, return_entropy=True
    )
    # A large upstream gradient: a clamp at the smallest float would overflow here.
    got = torch.autograd.grad((log_probs.sum() + 100 * entropy.sum()), (hidden, weight))
    expected = linear_selective_log_softmax_reference(hidden, weight[4:], index % 4, None, 0.5, True)
    torch.testing.assert_close((log_probs, entropy), expected)
    reference = torch.autograd.grad(expected[0].sum() + 100 * expected[1].sum(), (hidden, weight))
    for one, other in zip(got, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_zero_keep_their_digits(shift):
    hidden, weight, _, index = problem(5, 3, 8, torch.float32)
    bias = torch.full((8,), shift)
    got = linear_selective_log_softmax(hidden, weight, index, bias=bias, return_entropy=True)
    rounded = (hidden @ weight.t() + bias).double().log_softmax(1)
    expected = rounded.gather(1, index[:, None]).squeeze(1), -(rounded.exp() * rounded).sum(1)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


def test_no_tensor_of_rows_times_vocabulary(set_chunk_rows, record_operations):
    n, h, v, chunk = 90, 4, 200, 6
    hidden, weight, bias, index = problem(n, h, v)
    set_chunk_rows(chunk, v)
    with record_operations() as record:
        log_probs, entropy = linear_selective_log_softmax(hidden, weight, index, bias=bias, return_entropy=True)
        (log_probs + entropy).sum().backward()
    assert record.largest <= chunk * v < n * v


@pytest.mark.parametrize(("rows", "expected"), [(100, [3, 2, 2]), (4, [8, 6, 6])])
def test_what_is_frozen_or_kept_costs_no_product(set_chunk_rows, record_operations, rows, expected):
    """A single chunk is kept for the backward; two are computed again."""
    hidden, weight, _, index = problem()
    set_chunk_rows(rows, 11)
    counts = []
    for trained in ((hidden, weight), (hidden,), (weight,)):
        operands = [t if any(t is x for x in trained) else t.detach() for t in (hidden, weight)]
        with record_operations() as record:
            linear_selective_log_softmax(*operands, index).sum().backward()
        counts.append(record.products)
    assert counts == expected


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard, record_operations):
    hidden, weight, bias, index = problem()
    expected = linear_selective_log_softmax(hidden, weight, index, bias=bias)
    with guard(), record_operations() as record:
        got = linear_selective_log_softmax(hidden, weight, index, bias=bias)
    assert torch.equal(got, expected) and not got.requires_grad and record.products == 1


def test_strided_operands_and_repeatability(set_chunk_rows):
    hidden, weight, _, index = problem(8, 4, 6)
    set_chunk_rows(3, 6)
    wide = torch.stack([hidden.detach(), hidden.detach()], dim=2)
    first = linear_selective_log_softmax(hidden, weight, index)
    assert torch.equal(linear_selective_log_softmax(wide[:, :, 1].requires_grad_(), weight, index.int()), first)
    runs = [gradients(linear_selective_log_softmax(hidden, weight, index), (hidden, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_rows():
    hidden, weight, _, index = problem()
    got = linear_selective_log_softmax(hidden[:0], weight, index[:0])
    got.sum().backward()
    assert got.shape == (0,) and weight.grad.eq(0).all()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("hidden", {"hidden": torch.zeros(7)}),
        ("weight", {"weight": torch.zeros(11, 4)}),
        ("index", {"index": torch.zeros(6, dtype=torch.long)}),
        ("index", {"index": torch.full((7,), 11)}),
        ("bias", {"bias": torch.zeros(10)}),
        ("temperature", {"temperature": -1.0}),
    ],
)
def test_bad_arguments_are_named(name, kwargs):
    hidden, weight, bias, index = problem()
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        linear_selective_log_softmax(**({"hidden": hidden, "weight": weight, "index": index, "bias": bias} | kwargs))
