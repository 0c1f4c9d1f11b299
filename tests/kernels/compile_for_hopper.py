"""Compiles every Triton kernel for an H100 or H200 without one, by the launches that the ops themselves make.

Run as a script; prints the name of each kernel it has compiled and the shared memory it takes.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastcorl_kernels import (
    SharedPrefix,
    backend,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    paged_decode_attention,
    rope_to_pages,
    sample_tokens,
    selective_log_softmax,
)


class Hopper:
    """The part of a driver that compilation asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(function, *args, grid, warmup, **kwargs):
    kernel = launch(function, *args, grid=grid, warmup=True, **kwargs)
    print(function.__name__, kernel.metadata.shared)
    return kernel


def call_everything(vocabulary, dtype):
    logits, uncond = (torch.zeros(8, vocabulary, dtype=dtype).requires_grad_() for _ in range(2))
    hidden = torch.zeros(8, 64, dtype=dtype).requires_grad_()
    weight = torch.zeros(vocabulary, 64, dtype=dtype).requires_grad_()
    ids, values, temperatures = torch.zeros(8, dtype=torch.long), torch.zeros(8), torch.ones(8)
    common = {"cu_seqlens": torch.tensor([0, 4, 8]), "backend": "triton"}
    full = {"old_log_probs": values, "ref_log_probs": values, "mask": values == 0, "beta": 0.1, "delta": 2.0}
    for kwargs in (full, {"loss_type": "cispo"}):
        grpo_loss(logits, ids, values[:2], **common, **kwargs).loss.backward()
    for c, u in ((logits, uncond), (logits, uncond.detach()), (logits.detach(), uncond)):
        guided = {"policy": "cfg", "uncond": u, "guidance": 5.0}
        for importance in ("token", "sequence"):
            grpo_loss(c, ids, values[:2], importance=importance, **guided, **common).loss.backward()
    grpo_loss(logits.detach()[:, ::2], ids, values, **common)
    for temperature in (1.0, temperatures):
        result = selective_log_softmax(logits, ids, temperature=temperature, return_entropy=True, backend="triton")
        sum(result).sum().backward()
    for importance in ("token", "sequence"):
        linear_grpo_loss(hidden, weight, ids, values[:2], importance=importance, **common).loss.backward()


def decode(heads, kv_heads, head_dim, dtype):
    qkv = torch.zeros(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    table, rows = torch.zeros(8, head_dim), torch.zeros(4, dtype=torch.long)
    pages = [torch.zeros(2, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    query = rope_to_pages(qkv, table, table, rows, rows, *pages, backend="triton")
    lengths = torch.full((4,), 16, dtype=torch.int32)
    for columns, group in ((8, None), (38, None), (38, 2), (38, 40)):
        prefix = None if group is None else SharedPrefix(torch.tensor([0, 2, 4]).int(), lengths[:2], group)
        pages_of_rows = torch.zeros(4, columns, dtype=torch.int32)
        paged_decode_attention(query, *pages, pages_of_rows, lengths, prefix=prefix, backend="triton")


def sample(vocabulary, dtype):
    logits, rows = torch.zeros(4, vocabulary, dtype=dtype), torch.zeros(4, dtype=torch.long)
    guided = {"uncond": logits, "guidance": 5.0, "tokens_out": torch.stack([rows, rows])}
    for steps, options in ((3, {}), (2**32 - 1, guided), (rows, {"temperature": 0})):
        sample_tokens(logits, rows, steps, backend="triton", **options)
    for truncation in ({"top_k": 1}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, **guided}):
        sample_tokens(logits, rows, rows, backend="triton", **truncation)


if __name__ == "__main__":
    driver.set_active(Hopper())
    launch, JITFunction.run = JITFunction.run, compile_only
    backend._require_triton = lambda *_: None  # there is no CUDA tensor to show it
    for mode in ("sum_then_normalize", "normalize_then_sum"):
        group_advantages(torch.zeros(16, 3), 8, mode=mode, backend="triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call_everything(512, dtype)
        sample(512, dtype)
    for vocabulary in (20000, 20001):
        call_everything(vocabulary, torch.bfloat16)
        sample(vocabulary, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decode(32, 2, 256, dtype)
    for shape in ((8, 2, 64), (6, 2, 96), (16, 16, 128)):
        decode(*shape, torch.bfloat16)
