"""Log-probabilities of chosen tokens, from hidden states."""

from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import check_index_range, check_index_vector, check_linear, check_temperature
from fastcorl_kernels.log_softmax.autograd import differentiable_log_probs
from fastcorl_kernels.shard import make_shard
from fastcorl_kernels.sources import HeadSource


def linear_selective_log_softmax(
    hidden,
    weight,
    index,
    *,
    bias=None,
    temperature=1.0,
    return_entropy=False,
    process_group=None,
    vocab_start=None,
    backend=None,
):
    """``selective_log_softmax(hidden @ weight.T + bias, index)`` without an (N, V) tensor, forward or backward.

    The backward computes the logits again, chunk by chunk (4 matrix products in all, 3 for a frozen head); plain torch
    keeps up to 2**20 of them and saves that product.

    Args:
        hidden: (N, H) floating tensor.
        weight: (V, H) floating tensor; if it does not require grad, its gradient is not computed.
        index: (N,) int32 or int64, in [0, V).
        bias: (V,) floating tensor or None. The Triton path adds it in the type of the product: a float32 bias of a
            16-bit head is rounded to 16 bits, as the sum is, but for the drawn token.
        temperature: positive number that divides the logits, or (N,) floating tensor, one per row.
        return_entropy: also return the entropy of each row's distribution, differentiable as well.
        process_group: splits the vocabulary: weight and bias are this process's rows of the head, hidden and index are
            the same on every process. The result is too, and so is the gradient of hidden, already summed.
        vocab_start: id of weight's first row; by default the group's rank times V.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA (torch for float64).

    Returns:
        log_probs (N,), or (log_probs, entropy), both (N,); float32, or float64 if an operand is float64.

    Raises:
        ValueError: naming the argument that does not fit (ids out of range: on the CPU only).
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    check_linear(hidden, weight, bias)
    check_index_vector(index, "index", hidden.shape[0], hidden)
    shard = make_shard(process_group, vocab_start, weight)
    if shard is None:
        check_index_range(index, "index", weight.shape[0])
    check_temperature(temperature, hidden.shape[0], hidden)
    source = head_source(resolve_backend(backend, hidden, weight, bias))(hidden, weight, bias, temperature, shard=shard)
    return differentiable_log_probs(source, index.long(), return_entropy)


def head_source(backend):
    """The source of a linear head's logits for ``backend``."""
    if backend == "torch":
        return HeadSource
    from fastcorl_kernels.triton_sources import TritonHeadSource

    return TritonHeadSource
