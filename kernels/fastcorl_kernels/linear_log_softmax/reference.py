"""Plain torch form of ``linear_selective_log_softmax``; holds an (N, V) tensor."""

from fastcorl_kernels.checks import accumulator_dtype
from fastcorl_kernels.log_softmax.reference import selective_log_softmax_reference


def linear_reference(hidden, weight, bias=None):
    """(N, V) logits in the accumulation dtype."""
    dtype = accumulator_dtype(hidden, weight, bias)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def linear_selective_log_softmax_reference(hidden, weight, index, bias=None, temperature=1.0, return_entropy=False):
    """See ``linear_selective_log_softmax``."""
    return selective_log_softmax_reference(linear_reference(hidden, weight, bias), index, temperature, return_entropy)
