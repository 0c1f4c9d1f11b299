"""Compiles every Triton kernel for an H100 or H200 without one, by the launches that the ops themselves make.

Run as a script; prints the name of each kernel it has compiled and the shared memory it takes.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastcorl_kernels import backend, group_advantages, grpo_loss, linear_grpo_loss, selective_log_softmax


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
    for kwargs in (full, {"loss_type": "cispo"}, {"policy": "cfg", "uncond": uncond, "guidance": 5.0}):
        grpo_loss(logits, ids, values[:2], **common, **kwargs).loss.backward()
    grpo_loss(logits.detach()[:, ::2], ids, values, **common)
    for temperature in (1.0, temperatures):
        result = selective_log_softmax(logits, ids, temperature=temperature, return_entropy=True, backend="triton")
        sum(result).sum().backward()
    for importance in ("token", "sequence"):
        linear_grpo_loss(hidden, weight, ids, values[:2], importance=importance, **common).loss.backward()


if __name__ == "__main__":
    driver.set_active(Hopper())
    launch, JITFunction.run = JITFunction.run, compile_only
    backend._require_triton = lambda *_: None  # there is no CUDA tensor to show it
    for mode in ("sum_then_normalize", "normalize_then_sum"):
        group_advantages(torch.zeros(16, 3), 8, mode=mode, backend="triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call_everything(512, dtype)
    for vocabulary in (20000, 20001):
        call_everything(vocabulary, torch.bfloat16)
