"""Log-probabilities of chosen tokens, from hidden states."""

from fastcorl_kernels.checks import check_backend, check_index_range, check_index_vector, check_linear, check_number
from fastcorl_kernels.linear_log_softmax.autograd import linear_selective_log_softmax_chunked


def linear_selective_log_softmax(
    hidden, weight, index, *, bias=None, temperature=1.0, return_entropy=False, backend=None
):
    """``selective_log_softmax(hidden @ weight.T + bias, index)`` without an (N, V) tensor, forward or backward.

    The backward computes the logits again, chunk by chunk (4 matrix products in all, 3 for a frozen head).

    Args:
        hidden: (N, H) floating tensor.
        weight: (V, H) floating tensor; if it does not require grad, its gradient is not computed.
        index: (N,) int32 or int64, in [0, V).
        bias: (V,) floating tensor or None.
        temperature: positive number that divides the logits.
        return_entropy: also return the entropy of each row's distribution, differentiable as well.
        backend: None or ``"torch"``.

    Returns:
        log_probs (N,), or (log_probs, entropy), both (N,); float32, or float64 if an operand is float64.

    Raises:
        ValueError: naming the argument that does not fit (ids out of range: on the CPU only).
        RuntimeError: for ``backend="triton"``.
    """
    check_backend(backend)
    check_linear(hidden, weight, bias)
    check_index_vector(index, "index", hidden.shape[0], hidden)
    check_index_range(index, "index", weight.shape[0])
    check_number(temperature, "temperature", exclusive=True)
    return linear_selective_log_softmax_chunked(hidden, weight, index, bias, temperature, return_entropy)
