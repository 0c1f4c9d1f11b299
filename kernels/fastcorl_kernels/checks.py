"""Argument checks shared by every op. A bad argument is a ValueError that names it, what was expected and what came."""

import math
import numbers
import os

import torch


def describe(value):
    """A short description of an argument for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return repr(value)


def require(condition, name, expected, got):
    """Raise ``ValueError("<name>: expected <expected>, got <got>")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def check_choice(value, name, choices):
    require(value in choices, name, "one of " + ", ".join(map(repr, choices)), value)


def check_number(value, name, minimum=0.0, exclusive=False):
    """A finite number, at least (or, if ``exclusive``, above) ``minimum``."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    bound = f"a finite number {'above' if exclusive else 'at least'} {minimum:g}"
    require(number and (value > minimum if exclusive else value >= minimum), name, bound, value)


def check_float_matrix(value, name, shape):
    """A 2-d floating tensor; ``shape`` is its description, such as ``"(N, V)"``."""
    is_matrix = isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_floating_point()
    require(is_matrix, name, f"a floating tensor of shape {shape}", value)


def check_float_vector(value, name, length, like):
    """A floating tensor of shape ``(length,)`` on the device of ``like``."""
    fits = isinstance(value, torch.Tensor) and tuple(value.shape) == (length,) and value.is_floating_point()
    require(
        fits and value.device == like.device, name, f"a floating tensor of shape ({length},) on {like.device}", value
    )


def check_index_vector(value, name, length, like):
    """An int32 or int64 tensor of shape ``(length,)`` on the device of ``like``."""
    fits = isinstance(value, torch.Tensor) and tuple(value.shape) == (length,)
    fits = fits and value.dtype in (torch.int32, torch.int64) and value.device == like.device
    require(fits, name, f"an int32 or int64 tensor of shape ({length},) on {like.device}", value)


def is_integer(value, least):
    """Whether ``value`` is a whole number of at least ``least``, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def check_index_range(index, name, vocabulary, mask=None):
    """Ids within ``[0, vocabulary)`` on the rows that ``mask`` keeps.

    Off the CPU only with FASTCORL_KERNELS_DEBUG=1 in the environment, since looking makes the host wait for the device,
    and never while a CUDA graph is captured, which cannot wait.
    """
    looks = index.device.type == "cpu" or os.environ.get("FASTCORL_KERNELS_DEBUG") == "1"
    if not looks or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    index = index if mask is None else index[mask]
    if index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{name}: expected ids in [0, {vocabulary}), got ids from {low} to {high}")


def check_temperature(value, length, like):
    """A positive number, or a floating tensor (length,) of them."""
    if isinstance(value, torch.Tensor):
        check_float_vector(value, "temperature", length, like)
    else:
        check_number(value, "temperature", exclusive=True)


def check_guidance(policy, uncond, guidance, name, like):
    """The second row set of a guided policy, which must look like the first; None without guidance."""
    check_choice(policy, "policy", ("cond", "cfg"))
    check_number(guidance, "guidance")
    if policy == "cond":
        require(uncond is None, name, "None with policy='cond'", uncond)
        return
    fits = isinstance(uncond, torch.Tensor) and uncond.shape == like.shape and uncond.dtype == like.dtype
    shape, dtype = tuple(like.shape), str(like.dtype).removeprefix("torch.")
    expected = f"a {dtype} tensor of shape {shape} on {like.device} with policy='cfg'"
    require(fits and uncond.device == like.device, name, expected, uncond)


def check_linear(hidden, weight, bias):
    """The operands of a linear head: hidden (N, H), weight (V, H), bias (V,) or None."""
    check_float_matrix(hidden, "hidden", "(N, H)")
    check_float_matrix(weight, "weight", "(V, H)")
    fits = weight.shape[1] == hidden.shape[1] and weight.device == hidden.device
    require(fits, "weight", f"a floating tensor of shape (V, {hidden.shape[1]}) on {hidden.device}", weight)
    if bias is not None:
        check_float_vector(bias, "bias", weight.shape[0], hidden)


def accumulator_dtype(*tensors):
    """float64 if any operand is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
