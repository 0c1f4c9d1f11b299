"""Log-probabilities of chosen tokens, from logits."""

from fastcorl_kernels.checks import (
    check_backend,
    check_float_matrix,
    check_index_range,
    check_index_vector,
    check_number,
)
from fastcorl_kernels.log_softmax.reference import selective_log_softmax_reference


def selective_log_softmax(logits, index, *, temperature=1.0, return_entropy=False, backend=None):
    """``log_softmax(logits / temperature)`` at one index per row, differentiable in ``logits``.

    Args:
        logits: (N, V) floating tensor, any strides. -inf entries are allowed (a row needs one finite entry).
        index: (N,) int32 or int64, in [0, V).
        temperature: positive number that divides the logits.
        return_entropy: also return the entropy of each row's distribution, differentiable as well.
        backend: None or ``"torch"``.

    Returns:
        log_probs (N,), or (log_probs, entropy), both (N,); float32, or float64 for float64 logits.

    Raises:
        ValueError: naming the argument that does not fit (ids out of range: on the CPU only).
        RuntimeError: for ``backend="triton"``.
    """
    check_backend(backend)
    check_float_matrix(logits, "logits", "(N, V)")
    check_index_vector(index, "index", logits.shape[0], logits)
    check_index_range(index, "index", logits.shape[1])
    check_number(temperature, "temperature", exclusive=True)
    return selective_log_softmax_reference(logits, index, temperature, return_entropy)
