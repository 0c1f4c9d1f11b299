"""A compiled function may call the ops; they run with what graph breaks that takes."""

import pytest
import torch

from fastcorl_kernels import grpo_loss, linear_grpo_loss, linear_selective_log_softmax, selective_log_softmax


def step(op, p):
    hidden = torch.tanh(p.hidden) * 2
    if op == "linear_grpo_loss":
        loss = linear_grpo_loss(
            hidden,
            p.weight,
            p.token_ids,
            p.advantages,
            cu_seqlens=p.cu_seqlens,
            mask=p.mask,
            old_log_probs=p.old_log_probs,
        ).loss
    elif op == "grpo_loss":
        loss = grpo_loss(hidden @ p.weight.t(), p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens, mask=p.mask).loss
    elif op == "linear_selective_log_softmax":
        loss = linear_selective_log_softmax(hidden, p.weight, p.token_ids).mean()
    else:
        loss = selective_log_softmax(hidden @ p.weight.t(), p.token_ids).mean()
    return loss * 3 + hidden.sum()


@pytest.mark.parametrize(
    "op", ["grpo_loss", "linear_grpo_loss", "selective_log_softmax", "linear_selective_log_softmax"]
)
def test_inside_torch_compile(make_problem, op):
    p = make_problem()
    inputs = (p.hidden, p.weight)
    expected = step(op, p)
    got = torch.compile(step, backend="aot_eager")(op, p)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)
