"""Sizes that need a GPU: Janus-Pro's vocabularies in bfloat16, more than 2^31 logits, very long sequences."""

import pytest
import torch

from fastcorl_kernels import grpo_loss, linear_grpo_loss, linear_selective_log_softmax, selective_log_softmax

pytestmark = pytest.mark.gpu
VOCABULARIES = [16384, 102400, 102401]


def make_rows(count, vocabulary, sequences=4, dtype=torch.bfloat16):
    torch.manual_seed(0)
    logits = torch.randn(count, vocabulary, device="cuda", dtype=dtype).mul_(3)
    ids = torch.randint(vocabulary, (count,), device="cuda")
    bounds = torch.linspace(0, count, sequences + 1).long().to("cuda")
    return logits, ids, bounds, torch.randn(sequences, device="cuda")


def assert_near(got, expected, relative):
    """The largest difference against the largest value: what rounding to 16 bits allows."""
    assert (got.float() - expected.float()).abs().max() <= relative * expected.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_grpo_loss(loss_type, vocabulary, dtype):
    logits, ids, bounds, advantages = make_rows(96, vocabulary, dtype=dtype)
    old = selective_log_softmax(logits, ids, backend="torch") + 0.3 * torch.randn(96, device="cuda")
    mask = torch.rand(96, device="cuda") > 0.2
    kwargs = {"cu_seqlens": bounds, "old_log_probs": old, "ref_log_probs": old, "mask": mask, "beta": 0.1}
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    expected = grpo_loss(exact, ids, advantages, loss_type=loss_type, backend="torch", **kwargs)
    got = grpo_loss(logits, ids, advantages, loss_type=loss_type, **kwargs)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name).double(), value, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(result.loss, x)[0] for result, x in ((got, logits), (expected, exact))]
    assert_near(*grads, 1e-5 if dtype == torch.float32 else 1e-2)
    assert grads[0][~mask].eq(0).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("trained", [False, True])
def test_linear_grpo_loss(vocabulary, importance, trained):
    torch.manual_seed(0)
    hidden = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, 256, device="cuda") / 8).bfloat16().requires_grad_(trained)
    ids = torch.randint(vocabulary, (3000,), device="cuda")
    bounds = torch.linspace(0, 3000, 9).long().cuda()
    advantages, mask = torch.randn(8, device="cuda"), torch.rand(3000, device="cuda") > 0.3
    old = linear_selective_log_softmax(hidden.detach(), weight.detach(), ids, backend="torch")
    old += 0.1 * torch.randn_like(old)
    kwargs = {"cu_seqlens": bounds, "mask": mask, "old_log_probs": old, "importance": importance}
    expected = linear_grpo_loss(hidden, weight, ids, advantages, backend="torch", **kwargs)
    got = linear_grpo_loss(hidden, weight, ids, advantages, **kwargs)
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=1e-3, atol=1e-2)
    leaves = [hidden, weight] if trained else [hidden]
    for one, other in zip(*(torch.autograd.grad(r.loss, leaves) for r in (got, expected)), strict=True):
        assert_near(one, other, 2e-2)


def test_more_than_two_to_the_31_logits():
    logits, ids, bounds, advantages = make_rows(21500, 102400)
    logits.requires_grad_()
    result = grpo_loss(logits, ids, advantages, cu_seqlens=bounds)
    result.loss.backward()
    last = slice(-8, None)
    exact = torch.log_softmax(logits.detach()[last].double(), -1).gather(1, ids[last, None]).squeeze(1)
    torch.testing.assert_close(result.log_probs[last].double(), exact, rtol=1e-5, atol=1e-5)
    assert logits.grad[last].ne(0).any(1).all()


def test_a_sequence_of_70000_rows():
    logits, ids, bounds, advantages = make_rows(70000, 512, sequences=1)
    expected = grpo_loss(logits, ids, advantages, cu_seqlens=bounds, backend="torch")
    got = grpo_loss(logits, ids, advantages, cu_seqlens=bounds)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_two_runs_are_equal_bit_for_bit(linear):
    logits, ids, bounds, advantages = make_rows(2000, 16384)
    weight = torch.randn(16384, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    runs = []
    for _ in range(2):
        if linear:
            hidden = logits[:, :128].contiguous().requires_grad_()
            loss = linear_grpo_loss(hidden, weight, ids, advantages, cu_seqlens=bounds).loss
            runs.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        else:
            leaf = logits.clone().requires_grad_()
            loss = grpo_loss(leaf, ids, advantages, cu_seqlens=bounds).loss
            runs.append((loss, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_new_lengths_compile_nothing():
    from fastcorl_kernels.grpo.triton_kernels import grpo_rows_kernel

    def compiled():
        return len(grpo_rows_kernel.device_caches[torch.cuda.current_device()][0])

    counts = []
    for rows in (96, 97, 1, 1024, 131):
        logits, ids, bounds, advantages = make_rows(rows, 1000, sequences=1)
        grpo_loss(logits, ids, advantages, cu_seqlens=bounds)
        counts.append(compiled())
    assert len(set(counts)) == 1


def test_no_host_synchronisation():
    """Without a mask nothing reads the device's memory."""
    logits, ids, bounds, advantages = make_rows(96, 1000)
    logits.requires_grad_()
    grpo_loss(logits, ids, advantages, cu_seqlens=bounds).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        grpo_loss(logits, ids, advantages, cu_seqlens=bounds, mask=ids >= 0).loss.backward()
        selective_log_softmax(logits, ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
