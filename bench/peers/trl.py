"""TRL's own functions: ``selective_log_softmax``, and the chunked head that its trainers use by now."""

import pytest

from bench.peers.contestant import Contestant
from bench.peers.plain import objective


def _trl(module):
    return pytest.importorskip(module, exc_type=ImportError)


def _log_probs(problem):
    selective_log_softmax = _trl("trl.trainer.utils").selective_log_softmax
    by_sequence, token_ids = problem.rows.by_sequence, problem.rows.token_ids
    return lambda logits: selective_log_softmax(by_sequence(logits), by_sequence(token_ids)).flatten().float()


def log_softmax(problem):
    return Contestant(_log_probs(problem), problem.leaves)


def grpo(problem):
    log_probs = _log_probs(problem)
    return Contestant(lambda logits: objective(log_probs(logits), problem.rows), problem.leaves)


def _chunked_log_probs(problem):
    """On a GPU TRL drops the masked rows before the head; elsewhere it scores them all."""
    function = _trl("trl.kernels").ChunkedLogProbFunction
    chunk_size = _trl("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    token_ids, mask = problem.rows.token_ids, problem.rows.mask

    def log_probs(hidden, weight, token_ids=token_ids):
        return function.apply(hidden, weight, None, token_ids, 1.0, chunk_size, None, 1.0, ())[0]

    def kept_log_probs(hidden, weight):
        kept = log_probs(hidden[mask], weight, token_ids[mask])
        return kept.new_zeros(mask.shape).masked_scatter(mask, kept)

    return log_probs if mask is None or not problem.hidden.is_cuda else kept_log_probs


def chunked_log_softmax(problem):
    return Contestant(_chunked_log_probs(problem), problem.leaves)


def chunked_grpo(problem):
    log_probs = _chunked_log_probs(problem)
    return Contestant(lambda hidden, weight: objective(log_probs(hidden, weight), problem.rows), problem.leaves)
