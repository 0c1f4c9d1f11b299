"""Drawing tokens from logits, with noise that depends on a row's seed, the step and the token id alone."""

from typing import NamedTuple

import torch

from fastcorl_kernels.backend import resolve_backend
from fastcorl_kernels.checks import check_float_matrix, check_index_vector, check_number, is_integer, require
from fastcorl_kernels.sampling.reference import gumbel_noise_reference, sample_tokens_reference


class SampledTokens(NamedTuple):
    """What ``sample_tokens`` gives: the drawn tokens, and their log-probabilities with guidance and without it."""

    tokens: torch.Tensor  # (n,) int64
    log_probs: torch.Tensor  # (n,) float32
    cond_log_probs: torch.Tensor  # (n,) float32; without guidance it is `log_probs` itself


def gumbel_noise(seeds, steps, num_tokens):
    """Standard Gumbel noise, a pure function of (row seed, step, token id), in plain torch.

    Args:
        seeds: (n,) int64 in [0, 2**32), on any device; only their low 32 bits count.
        steps: an integer of at least 0, or (n,) int32 or int64, one per row.
        num_tokens: V, at least 1; token ids are 0 to V - 1.

    Returns:
        (n, num_tokens) float32, finite everywhere. A row's noise does not depend on n, V, or its place in the batch.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_seeds(seeds)
    _check_steps(steps, seeds)
    _check_count(num_tokens, "num_tokens")
    return gumbel_noise_reference(seeds, steps, num_tokens)


def sample_tokens(
    logits,
    seeds,
    steps,
    *,
    uncond=None,
    guidance=1.0,
    temperature=1.0,
    top_k=None,
    top_p=None,
    tokens_out=None,
    backend=None,
):
    """Draw one token per row from ``softmax(logits / temperature)`` by the Gumbel-max trick.

    The token is the argmax of ``logits / temperature + gumbel_noise(seeds, steps, V)``, so a row draws the same token
    whatever its neighbours, its place in the batch, or the rank it runs on.

    Args:
        logits: (n, V) floating tensor, any strides; the arithmetic is float32. -inf entries are allowed (a row needs
            one finite entry).
        seeds: (n,) int64 in [0, 2**32), on the device of ``logits``.
        steps: an integer of at least 0, or (n,) int32 or int64 on the device of ``logits``.
        uncond: (n, V) like ``logits``: draw from the guided logits ``uncond + guidance * (logits - uncond)`` (-inf
            where both are).
        guidance: number of at least 0.
        temperature: positive number that divides the (guided) logits; 0 takes their argmax, the lowest id of equals.
        top_k: draw from the ``top_k`` most likely tokens, and what equals the least likely of them; None is off.
        top_p: draw from the fewest most likely tokens of those that have together at least this probability, in
            (0, 1], under the tempered, guided distribution over the ``top_k``; tokens as likely as the last of them
            are kept with it. None is off.
        tokens_out: int64 tensor (n,) or (k, n), any strides, into which the tokens are written as well, all k times.
        backend: None, ``"torch"`` or ``"triton"``; None is Triton on CUDA (torch for float64).

    Returns:
        ``SampledTokens``. ``log_probs`` are the drawn tokens' under the whole tempered, guided distribution, which
        ``top_k`` and ``top_p`` do not touch: those are what training computes. ``cond_log_probs`` are under
        ``softmax(logits / temperature)`` without guidance. Both are at temperature 1 where ``temperature`` is 0.
        Without gradient. With Triton it is one launch, and the host does not wait.

    Raises:
        ValueError: naming the argument that does not fit.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """
    check_float_matrix(logits, "logits", "(n, V)")
    count, vocabulary = logits.shape
    require(vocabulary > 0, "logits", "at least one column", logits)
    check_index_vector(seeds, "seeds", count, logits)
    _check_steps(steps, logits)
    check_number(guidance, "guidance")
    check_number(temperature, "temperature")
    if uncond is not None:
        fits = isinstance(uncond, torch.Tensor) and uncond.shape == logits.shape and uncond.dtype == logits.dtype
        require(fits and uncond.device == logits.device, "uncond", "a tensor like logits", uncond)
    if top_k is not None:
        _check_count(top_k, "top_k")
    if top_p is not None:
        check_number(top_p, "top_p", exclusive=True)
        require(top_p <= 1, "top_p", "a number of at most 1", top_p)
    if tokens_out is not None:
        fits = isinstance(tokens_out, torch.Tensor) and tokens_out.dtype == torch.int64
        fits = fits and tokens_out.dim() in (1, 2) and tokens_out.shape[-1] == count
        expected = f"an int64 tensor of shape ({count},) or (k, {count}) on {logits.device}"
        require(fits and tokens_out.device == logits.device, "tokens_out", expected, tokens_out)
    # What keeps everything, or nothing but the argmax, needs no threshold.
    top_k = None if temperature == 0 or top_k is None or top_k >= vocabulary else top_k
    top_p = None if temperature == 0 or top_p == 1 else top_p
    arguments = (logits, seeds, steps, uncond, guidance, temperature, top_k, top_p)
    if resolve_backend(backend, logits) == "triton":
        from fastcorl_kernels.sampling.triton_kernels import sample_tokens_triton

        with torch.cuda.device_of(logits):
            return SampledTokens(*sample_tokens_triton(*arguments, tokens_out))
    sampled = SampledTokens(*sample_tokens_reference(*arguments))
    if tokens_out is not None:
        tokens_out.copy_(sampled.tokens)
    return sampled


def _check_seeds(seeds):
    fits = isinstance(seeds, torch.Tensor) and seeds.dim() == 1 and seeds.dtype in (torch.int32, torch.int64)
    require(fits, "seeds", "an int32 or int64 tensor of shape (n,)", seeds)


def _check_steps(steps, rows):
    if isinstance(steps, torch.Tensor):
        check_index_vector(steps, "steps", rows.shape[0], rows)
    else:
        require(is_integer(steps, 0), "steps", "an integer of at least 0, or a tensor (n,) of them", steps)


def _check_count(value, name):
    require(is_integer(value, 1), name, "an integer of at least 1", value)
