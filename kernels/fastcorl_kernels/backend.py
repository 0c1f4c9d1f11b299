"""Which implementation runs: plain torch anywhere, Triton on CUDA (or anywhere under Triton's interpreter)."""

import functools
import importlib.util
import os
import warnings

import torch

from fastcorl_kernels.checks import require


def resolve_backend(backend, *operands):
    """``"torch"`` or ``"triton"`` for these operands (None entries are ignored).

    ``backend=None`` takes Triton for CUDA operands and torch for everything else: the CPU, and float64, which the
    Triton kernels do not compute in. An explicit ``"triton"`` that cannot run is an error.
    """
    require(backend in (None, "torch", "triton"), "backend", "None, 'torch' or 'triton'", backend)
    tensors = [operand for operand in operands if operand is not None]
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if backend == "triton":
        _require_triton(tensors[0], double)
    if backend is not None:
        return backend
    if not tensors[0].is_cuda or double:
        return "torch"
    if not _triton_installed():
        _warn_once("fastcorl_kernels: triton is not installed, so CUDA tensors run plain torch")
        return "torch"
    return "triton"


def _require_triton(tensor, double):
    if not _triton_installed():
        raise RuntimeError("backend='triton': triton is not installed; install it or pass backend='torch'")
    if double:
        raise ValueError("backend: expected 'torch' or None for float64 operands, got 'triton', which has no float64")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("backend='triton': needs CUDA tensors, or TRITON_INTERPRET=1 in the environment")


@functools.cache
def _triton_installed():
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)
