"""Log-probabilities of chosen tokens, from logits."""

from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import (
    check_float_matrix,
    check_index_range,
    check_index_vector,
    check_temperature,
)
from fastcorl_kernels.log_softmax.autograd import differentiable_log_probs
from fastcorl_kernels.sources import LogitsSource


def selective_log_softmax(logits, index, *, temperature=1.0, return_entropy=False, backend=None):
    """``log_softmax(logits / temperature)`` at one index per row, differentiable in ``logits``.

    Args:
        logits: (N, V) floating tensor, any strides. -inf entries are allowed (a row needs one finite entry).
        index: (N,) int32 or int64, in [0, V).
        temperature: positive number that divides the logits, or (N,) floating tensor, one per row.
        return_entropy: also return the entropy of each row's distribution, differentiable as well.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA (torch for float64).

    Returns:
        log_probs (N,), or (log_probs, entropy), both (N,); float32, or float64 for float64 logits. The backward
        computes the softmax again: nothing of size (N, V) is kept but ``logits``, and up to 2**20 log-probabilities.
        Only first derivatives exist.

    Raises:
        ValueError: naming the argument that does not fit (ids out of range: on the CPU only).
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    check_float_matrix(logits, "logits", "(N, V)")
    check_index_vector(index, "index", logits.shape[0], logits)
    check_index_range(index, "index", logits.shape[1])
    check_temperature(temperature, logits.shape[0], logits)
    source = logits_source(resolve_backend(backend, logits))(logits, None, 1.0, temperature)
    return differentiable_log_probs(source, index.long(), return_entropy)


def logits_source(backend):
    """The source of given logits for ``backend``."""
    if backend == "torch":
        return LogitsSource
    from fastcorl_kernels.triton_sources import TritonLogitsSource

    return TritonLogitsSource
