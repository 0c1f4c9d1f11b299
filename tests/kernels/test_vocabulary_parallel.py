"""A head split over two processes gives what the whole head gives."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastcorl_kernels import linear_grpo_loss, linear_selective_log_softmax, sources

BOUNDS = (0, 20, 37)  # uneven, so vocab_start is needed
LENGTHS = (4, 0, 1, 6)


def make_inputs(dtype, forbidden):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, advantages = (torch.randn(*shape, generator=g) for shape in ((11, 5), (37, 5), (37,), (4,)))
    ids = torch.randint(20, 37, (11,), generator=g)
    bias[:forbidden] = -torch.inf
    mask = torch.rand(11, generator=g) > 0.3
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), ids, advantages.to(dtype), mask


def results(hidden, weight, bias, ids, advantages, mask, backend, **shard):
    """Every output and gradient of the two ops, in a list."""
    out = []
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    for importance in ("token", "sequence"):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        result = linear_grpo_loss(
            *inputs[:2],
            ids,
            advantages,
            bias=inputs[2],
            cu_seqlens=cu_seqlens,
            old_log_probs=torch.full((11,), -3.0, dtype=hidden.dtype),
            mask=mask,
            temperature=0.7,
            importance=importance,
            backend=backend,
            **shard,
        )
        metrics = [value for value in vars(result).values() if value is not None]
        out += [*metrics, *torch.autograd.grad(result.loss * 2.5, inputs)]
    inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    outputs = linear_selective_log_softmax(
        *inputs[:2], ids, bias=inputs[2], temperature=0.7, return_entropy=True, backend=backend, **shard
    )
    upstream = [torch.linspace(-1, 2, 11, dtype=hidden.dtype)] * 2
    return [tensor.detach() for tensor in (*out, *outputs, *torch.autograd.grad(outputs, inputs, upstream))]


def run_rank(rank, folder, backend, forbidden):
    sources.MINIMUM_CHUNK_ROWS = 4
    if backend == "triton":
        from fastcorl_kernels import triton_sources

        triton_sources.MINIMUM_CHUNK_ROWS = 4
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    hidden, weight, bias, *rest = make_inputs(torch.float64 if backend == "torch" else torch.float32, forbidden)
    part = slice(BOUNDS[rank], BOUNDS[rank + 1])
    shard = {"process_group": dist.group.WORLD, "vocab_start": BOUNDS[rank]}
    torch.save(results(hidden, weight[part], bias[part], *rest, backend, **shard), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("forbidden", [2, 20])  # some of the first process's part, or all of it
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_processes_agree_with_one(tmp_path, backend, forbidden):
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here, for CUDA tensors only")
    mp.spawn(run_rank, args=(str(tmp_path), backend, forbidden), nprocs=2)
    inputs = make_inputs(torch.float64, forbidden)
    expected = results(*inputs, "torch")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if backend == "triton" else {}
    for number, value in enumerate(expected):
        ours = [part[number].double() for part in parts]
        if value.shape[:1] == (37,):  # a gradient of the head: each process has its rows
            torch.testing.assert_close(torch.cat(ours), value, **tolerance)
        else:
            assert torch.equal(*ours)
            torch.testing.assert_close(ours[0], value, **tolerance)


def test_vocab_start_needs_a_group():
    with pytest.raises(ValueError, match=r"^vocab_start: expected None without process_group, got 3"):
        linear_selective_log_softmax(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2).long(), vocab_start=3)
