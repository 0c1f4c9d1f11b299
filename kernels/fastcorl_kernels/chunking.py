"""Linear heads in chunks of rows: the pieces that keep an (N, V) tensor from ever existing."""

import torch

from fastcorl_kernels.checks import accumulator_dtype

# Elements of one (rows, V) chunk: 128 MiB in float32, of which two or three are alive at a time. Larger chunks cost
# memory and save little; with a trained head, smaller ones add a read and a write of the weight gradient each.
CHUNK_ELEMENTS = 2**25


def chunk_rows(vocabulary):
    """How many rows of ``vocabulary`` logits one chunk holds."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def row_chunks(count, vocabulary):
    """The ``(start, stop)`` spans that cover ``count`` rows."""
    step = chunk_rows(vocabulary)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


class ChunkedHead:
    """``hidden @ weight.T + bias`` over the rows that count, one chunk at a time.

    hidden (N, H), weight (V, H), bias (V,) or None; ``rows`` (M,) picks rows of ``hidden``, None takes all of them.
    Everything is computed in float32, or float64 when an operand is float64.
    """

    def __init__(self, hidden, weight, bias, temperature, rows=None):
        self.dtype = accumulator_dtype(hidden, weight, bias)
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.temperature = temperature
        self.rows = rows
        self.count = hidden.shape[0] if rows is None else rows.shape[0]

    def chunks(self):
        return row_chunks(self.count, self.weight.shape[0])

    def hidden_rows(self, start, stop):
        """The hidden states of rows ``start`` to ``stop``: (C, H)."""
        chosen = self.hidden[start:stop] if self.rows is None else self.hidden.index_select(0, self.rows[start:stop])
        return chosen.to(self.dtype)

    def log_softmax(self, hidden_rows, index):
        """``(log p over the vocabulary (C, V), log p of index (C,))``."""
        logits = hidden_rows @ self.weight.t()
        if self.bias is not None:
            logits += self.bias
        if self.temperature != 1.0:
            logits /= self.temperature
        log_p = torch.log_softmax(logits, dim=1)
        return log_p, log_p.gather(1, index[:, None]).squeeze(1)


def entropy_rows(log_p):
    """Entropy (C,) of ``log_p`` (C, V), and the probabilities; overwrites ``log_p``.

    exp(-1e4) is 0 in float32 and float64 alike, so the clamp changes no product, and turns 0 * -inf into 0.
    """
    p = log_p.exp()
    log_p.clamp_(min=-1e4)
    return -(p * log_p).sum(dim=1), p


def logit_gradient(log_p, p, index, grad_log_prob, temperature, entropy=None, grad_entropy=None):
    """Gradient (C, V) with respect to the raw logits; overwrites ``p`` and, for the entropy, ``log_p``.

    ``log_p`` must be clamped, as ``entropy_rows`` leaves it.
    """
    if grad_entropy is None:
        p *= -grad_log_prob[:, None]
    else:
        log_p += entropy[:, None]
        log_p *= -grad_entropy[:, None]
        log_p -= grad_log_prob[:, None]
        p *= log_p
    p.scatter_add_(1, index[:, None], grad_log_prob[:, None])
    if temperature != 1.0:
        p /= temperature
    return p


class HeadGradients:
    """Accumulates the gradients that somebody asked for; what is frozen costs no memory and no matrix product."""

    def __init__(self, head, needs):
        self.head = head
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden = head.hidden.new_zeros(head.hidden.shape, dtype=head.dtype) if needs_hidden else None
        self.weight = torch.zeros_like(head.weight) if needs_weight else None
        self.bias = torch.zeros_like(head.bias) if needs_bias else None

    def add(self, start, stop, hidden_rows, grad_logits):
        if self.hidden is not None:
            grad_hidden = grad_logits @ self.head.weight
            if self.head.rows is None:
                self.hidden[start:stop] = grad_hidden
            else:
                self.hidden.index_copy_(0, self.head.rows[start:stop], grad_hidden)
        if self.weight is not None:
            self.weight.addmm_(grad_logits.t(), hidden_rows)
        if self.bias is not None:
            self.bias += grad_logits.sum(dim=0)


def needed_gradients(hidden, weight, bias):
    """Which of the three want a gradient; none of them outside of grad mode."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
