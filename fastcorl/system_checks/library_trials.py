"""Libraries and kernels, each run on something small."""

import importlib.util
import logging
import math
from collections.abc import Callable
from importlib import metadata

from fastcorl.system_checks.findings import Outcome

NO_GPU = "no GPU to try it on"
ATTENTION_PACKAGES = {"flash_attn": "flash-attn", "xformers": "xformers"}
# Of Janus-Pro 1B.
WIDTH, INTERMEDIATE, HEADS, HEAD_DIM = 2048, 5632, 16, 128
TOLERANCE = 0.02  # of the norm, as where training tries them


def try_torch() -> Outcome:
    """That torch multiplies and differentiates."""
    import torch

    states = torch.ones(4, 4, requires_grad=True)
    (states @ states).sum().backward()
    if states.grad.sum().item() != 128:
        raise RuntimeError("the gradient of a product is wrong")
    return "ok", f"{torch.__version__}: a product and its gradient"


def try_transformers() -> Outcome:
    """That transformers' Janus imports, and what of fastcorl stands on it."""
    import transformers
    from transformers.models.janus import modeling_janus

    importlib.import_module("fastcorl.model")
    return "ok", f"{transformers.__version__}: {modeling_janus.JanusModel.__name__} imports"


def try_deepspeed() -> Outcome:
    """That DeepSpeed imports."""
    if importlib.util.find_spec("deepspeed") is None:
        return "n/a", "not installed; one process trains without it"
    import deepspeed

    return "ok", f"{deepspeed.__version__} imports"


def try_torch_kernels() -> Outcome:
    """A loss and its gradient in plain torch."""
    loss, gradient = _loss("torch", "cpu")
    if not (math.isfinite(loss) and gradient.isfinite().all()):
        raise RuntimeError("a loss is not finite")
    return "ok", "a loss and its gradient on the CPU"


def try_triton_kernels() -> Outcome:
    """That Triton imports, and on a GPU that its kernels give what torch gives."""
    if importlib.util.find_spec("triton") is None:
        return "n/a", "triton is not installed; losses run in plain torch"
    import torch
    import triton

    if not torch.cuda.is_available():
        return "n/a", f"triton {triton.__version__} imports; {NO_GPU}"
    (loss, gradient), (expected, reference) = (_loss(backend, "cuda") for backend in ("triton", "torch"))
    error = max(abs(loss - expected), _error(gradient, reference))
    if not error < TOLERANCE:
        raise RuntimeError(f"a loss and its gradient are off by {error:.2g} of what torch gives")
    return "ok", f"triton {triton.__version__}: a loss and its gradient on the GPU, as torch gives them"


def _loss(backend: str, device: str):
    """A loss, and its gradient with respect to the hidden states."""
    import torch

    from fastcorl_kernels import linear_grpo_loss

    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 64, generator=generator).to(device) for rows in (6, 128))
    advantages, cu_seqlens = torch.tensor([1.0, -0.5], device=device), torch.tensor([0, 2, 6], device=device)
    token_ids = torch.arange(6, device=device)
    hidden.requires_grad_()
    loss = linear_grpo_loss(hidden, head, token_ids, advantages, cu_seqlens=cu_seqlens, backend=backend).loss
    loss.backward()
    return loss.item(), hidden.grad


def try_liger() -> Outcome:
    """That Liger's kernels import, and on a GPU which of them give what torch gives."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "n/a", "liger-kernel is not installed; blocks run on torch's modules"
    import torch

    importlib.import_module("liger_kernel.ops")
    version = metadata.version("liger-kernel")
    if not torch.cuda.is_available():
        return "n/a", f"liger-kernel {version} imports; {NO_GPU}"
    from fastcorl.model.fused_layers import Shape, working_kernels

    device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(_half(), device, WIDTH, INTERMEDIATE, HEADS, HEADS, HEAD_DIM, 1e-6, "silu")
    working, reasons = working_kernels(shape)
    if reasons:
        raise RuntimeError("; ".join(reasons))
    return "ok", f"liger-kernel {version}: {', '.join(working)} on the GPU, as torch gives them"


def attention_trial(name: str) -> Callable[[], Outcome]:
    """A trial of one value of `model.attention`."""
    return lambda: _try_attention(name)


def _try_attention(name: str) -> Outcome:
    package = ATTENTION_PACKAGES.get(name)
    if package and importlib.util.find_spec(name) is None:
        return "n/a", f"{package} is not installed"
    if package:
        importlib.import_module(name)
    import torch

    from fastcorl.model.backends import AUTO, SDPA, packed_backend
    from fastcorl.model.buckets import by_buckets
    from fastcorl.model.pack_layout import PackLayout, by_dense_mask

    cuda = torch.cuda.is_available()
    if not cuda and name not in (AUTO, SDPA):
        return "n/a", f"{package} {metadata.version(package)} imports; {NO_GPU}" if package else NO_GPU
    dtype, device = (_half(), torch.device("cuda")) if cuda else (torch.float32, torch.device("cpu"))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(packed_backend.__module__)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    backend = packed_backend(name, dtype, HEAD_DIM, device)
    # The others have been compared with SDPA by now.
    bounds = torch.tensor([0, 9, 12, 17], device=device)
    for attend, parents in ((backend.own, [-1, -1, -1]), (backend.shared, [-1, 0, 0])):
        if attend is by_buckets:
            layout = PackLayout(bounds, torch.tensor(parents))
            states = [torch.randn(layout.size, 2, HEAD_DIM, device=device, dtype=dtype) for _ in range(3)]
            error = _error(attend(*states, layout, 0.1), by_dense_mask(*states, layout, 0.1))
            if not error < TOLERANCE:
                raise RuntimeError(f"off by {error:.2g} of what attention with a dense mask gives")
    return "ok", "; ".join(said)


def _half():
    import torch

    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _error(actual, expected) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
