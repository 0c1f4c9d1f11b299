"""Where rows of logits come from, in plain torch: given, or a linear head's, a chunk of rows at a time.

A source yields log-probabilities and takes gradients of logits back to its operands. The Triton sources of
``triton_sources.py`` have the same methods, so that each operation has one autograd function for all of them.
"""

from contextlib import contextmanager

import torch

from fastcorl_kernels.checks import accumulator_dtype
from fastcorl_kernels.chunking import (
    MINIMUM_CHUNK_ROWS,
    aligned_spans,
    fits_a_chunk,
    head_chunk_rows,
    logits_chunk_rows,
    row_spans,
)
from fastcorl_kernels.grpo.objective import TokenTerms, log_prob_gradient, summarize, token_terms


def log_softmax_backward(grad, log_p):
    """``grad - exp(log_p) * grad.sum(1)``, (C, V), in place of ``grad``: what autograd runs."""
    return torch._log_softmax_backward_data(grad, log_p, 1, log_p.dtype, out=grad)


def probabilities(log_p, out=None):
    """exp(log_p), (C, V); by way of log_softmax's backward, whose exp takes half the time of torch.exp."""
    p = torch.zeros_like(log_p) if out is None else out.zero_()
    p[:, 0] = -1.0
    log_softmax_backward(p, log_p)
    p[:, 0] = log_p[:, 0].exp()
    return p


def entropy_rows(log_p, p, out=None):
    """Entropy (C,) of ``log_p`` and ``p``, (C, V) each; clamps ``log_p`` in place, and may overwrite one as ``out``.

    exp(-1e4) is 0 in float32 and float64 alike, so the clamp changes no product, and turns 0 * -inf into 0.
    """
    return -torch.mul(p, log_p.clamp_(min=-1e4), out=out).sum(1)


def logit_gradient(log_p, p, index, hit, grad_log_prob, temperature, entropy=None, grad_entropy=None):
    """Gradient (C, V) with respect to the raw logits; overwrites ``p`` and, for the entropy, ``log_p``.

    ``log_p`` must be clamped, as ``entropy_rows`` leaves it; ``hit`` (C,) bool or None says whose index is in the row.
    """
    if grad_entropy is None:
        p *= -grad_log_prob[:, None]
    else:
        log_p += entropy[:, None]
        log_p *= -grad_entropy[:, None]
        log_p -= grad_log_prob[:, None]
        p *= log_p
    at_index = grad_log_prob if hit is None else torch.where(hit, grad_log_prob, 0.0)
    p.scatter_add_(1, index[:, None], at_index[:, None])
    return p if temperature is None else p.div_(temperature)


class Source:
    """Rows of logits in plain torch; gradients are for ``operands``, in that order."""

    chunk_rows: int
    shard = None

    def __init__(self, operands, temperature, rows, row_count, vocabulary):
        self.given = operands
        self.dtype = accumulator_dtype(*operands)
        self.device = operands[0].device
        # A copy: the backward must see what the forward saw.
        self.temperature = temperature.detach().clone() if isinstance(temperature, torch.Tensor) else temperature
        self.rows = rows
        self.count = row_count if rows is None else rows.shape[0]
        self.vocabulary = vocabulary
        self.buffers = [None] * len(operands)

    def take_given(self):
        """The operands with their graph, once: a source that kept them would keep the graph alive."""
        given, self.given = self.given, None
        return given

    @contextmanager
    def bound(self, operands):
        """Work on these operands; outside of it the source holds none, since autograd keeps what a backward needs."""
        self.operands = tuple(operand.detach() for operand in operands)
        self.prepare()
        try:
            yield self
        finally:
            self.release()

    def prepare(self):
        """What is made of the operands before the first chunk."""

    def release(self):
        self.operands = None

    def keeps_float16(self):
        """Whether gradients are stored in float16 on their way."""
        return any(operand.dtype == torch.float16 for operand in self.operands)

    def peak(self, weights):
        """What gradients are divided by on their way through float16, which has no room for a mean over many rows.

        The largest of ``weights``, a one-element tensor; None where nothing is stored in float16.
        """
        if not self.keeps_float16() or weights.numel() == 0:
            return None
        return weights.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)

    def chunk_temperature(self, start, stop):
        """The temperature of a chunk, a number or (C, 1); None for 1."""
        if isinstance(self.temperature, torch.Tensor):
            return self.temperature[start:stop, None].to(self.dtype)
        return None if self.temperature == 1.0 else self.temperature

    def chunk(self, start, stop, index, want_entropy=True, spend=None):
        """(log p (C, V), p or None, log_probs (C,), entropy or None) of a chunk at its temperature.

        ``spend``, "log_p" or "p", names which of the two is needed no more and saves a third matrix.
        """
        logits = self.scaled_logits(start, stop)
        if self.shard is not None:
            return self.sharded_chunk(logits, index)
        log_p = torch.log_softmax(logits, dim=1)
        log_probs = log_p.gather(1, index[:, None]).squeeze(1).clone()  # autograd guards views that it returns
        if not want_entropy:
            return log_p, None, log_probs, None
        p = probabilities(log_p, self.gradient_room(start, stop))
        return log_p, p, log_probs, entropy_rows(log_p, p, {"log_p": log_p, "p": p}.get(spend))

    def sharded_chunk(self, logits, index):
        """``chunk`` of a part of the vocabulary; log p and p are this part's."""
        local_index, hit = self.shard.local(index)
        lse = torch.logsumexp(logits, dim=1)
        target = logits.gather(1, local_index[:, None]).squeeze(1).masked_fill(~hit, -torch.inf)
        own = logits - lse[:, None]
        lse, log_probs, entropy = self.shard.combine(lse, target, entropy_rows(own, probabilities(own)))
        log_p = logits.sub_(lse[:, None])
        p = probabilities(log_p)
        return log_p.clamp_(min=-1e4), p, log_probs, entropy

    def add_chunk(self, start, stop, log_p, p, index, grad_log_probs, entropy=None, grad_entropy=None):
        """Take the gradients of a chunk's log-probabilities and, where given, entropies back to the operands."""
        hit = None
        if self.shard is not None:
            index, hit = self.shard.local(index)
        temperature = self.chunk_temperature(start, stop)
        grad = logit_gradient(log_p, p, index, hit, grad_log_probs, temperature, entropy, grad_entropy)
        self.add(start, stop, grad)

    def log_probs(self, index, want_entropy):
        """(state for ``differentiate``, log_probs (M,), entropy (M,) or None).

        The state is log p (M, V) where that is small, else None.
        """
        keeps = self.shard is None and fits_a_chunk(self.count, self.vocabulary)
        state, chunks = None, []
        for start, stop in row_spans(self.count, self.chunk_rows):
            log_p, p, *rows = self.chunk(start, stop, index[start:stop], want_entropy, spend="p")
            chunks.append(rows)
            state = log_p if keeps else None
            del log_p, p  # before the next chunk is made
        return state, *joined(chunks)

    def differentiate(self, state, index, grad_log_probs, needs, entropy=None, grad_entropy=None):
        """Gradients of the operands (None where not needed) from those of ``log_probs`` (M,) and ``entropy`` (M,)."""
        self.begin(needs)
        for start, stop in row_spans(self.count, self.chunk_rows):
            grad = grad_log_probs[start:stop]
            room = self.gradient_room(start, stop)
            if grad_entropy is None and state is not None:
                at_index = torch.zeros_like(state) if room is None else room.zero_()
                at_index.scatter_(1, index[:, None], grad[:, None])
                temperature = self.chunk_temperature(start, stop)
                grad_logits = log_softmax_backward(at_index, state)
                self.add(start, stop, grad_logits if temperature is None else grad_logits.div_(temperature))
            elif grad_entropy is None and self.shard is None:
                p = torch.softmax(self.scaled_logits(start, stop), dim=1, out=room)
                self.add_chunk(start, stop, None, p, index[start:stop], grad)
            else:
                log_p, p, _, chunk_entropy = self.chunk(start, stop, index[start:stop])
                upstream = None if grad_entropy is None else grad_entropy[start:stop]
                self.add_chunk(start, stop, log_p, p, index[start:stop], grad, chunk_entropy, upstream)
        return self.gradients()

    def grpo(self, batch, settings, needs):
        """(GRPOLoss without a graph, gradients of its loss by the operands over a peak, that peak or None)."""
        spans = self.loss_spans(batch, settings) if any(needs) else None
        if spans is None:
            return self.two_passes(batch, settings, needs)
        peak = self.peak(batch.weights)
        self.begin(needs)
        chunks = []
        for start, stop, span in spans:
            p, log_probs, entropy = self.chunk(start, stop, span.token_ids, spend="log_p")[1:]
            terms = token_terms(log_probs, span, settings)
            upstream = over(log_prob_gradient(terms, span.weights, span, settings), peak)
            self.add_chunk(start, stop, None, p, span.token_ids, upstream)
            chunks.append((entropy, *terms))
            del p  # before the next chunk is made
        entropy, *terms = joined(chunks)
        return summarize(TokenTerms(*terms), entropy, batch), self.gradients(), peak

    def two_passes(self, batch, settings, needs):
        """``grpo`` with all log-probabilities first and then the gradients, if any are needed."""
        state, log_probs, entropy = self.log_probs(batch.token_ids, want_entropy=True)
        terms = token_terms(log_probs, batch, settings)
        result = summarize(terms, entropy, batch)
        if not any(needs):
            return result, self.buffers, None
        peak = self.peak(batch.weights)
        upstream = over(log_prob_gradient(terms, batch.weights, batch, settings), peak)
        return result, self.differentiate(state, batch.token_ids, upstream, needs), peak

    def loss_spans(self, batch, settings):
        """(start, stop, their part of the batch) of chunks whose loss needs no row of another.

        A ratio per sequence needs whole sequences. None if one is longer than a chunk, or if seeing the rows twice
        costs no matrix product anyway.
        """
        if settings.importance == "token":
            spans = row_spans(self.count, self.chunk_rows)
            return [(start, stop, batch.span(start, stop)) for start, stop in spans]
        if self.cheap:
            return None
        lengths = batch.lengths.tolist()
        if max(lengths, default=0) > self.chunk_rows:
            return None
        spans = aligned_spans(lengths, self.chunk_rows)
        return [(start, stop, batch.span(start, stop, (first, last))) for start, stop, first, last in spans]

    def gradients(self):
        """What ``begin`` made and ``add`` filled; the source lets go of it."""
        buffers, self.buffers = self.buffers, [None] * len(self.buffers)
        return buffers

    def scale(self, gradient, grad_loss, dtype, peak):
        """``gradient * grad_loss * peak`` as ``dtype``; overwrites ``gradient``."""
        factor = grad_loss if peak is None else grad_loss * peak.squeeze(0)
        if gradient.is_cuda or factor != 1.0:  # on CUDA, looking would make the host wait
            gradient *= factor
        return gradient.to(dtype)


def joined(chunks):
    """Of the row vectors of each chunk (None where there is nothing) those of all rows."""
    if len(chunks) == 1:
        return chunks[0]
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)]


def over(values, peak):
    return values if peak is None else values / peak


class LogitsSource(Source):
    """Given logits (N, V); with ``uncond`` (N, V), the guided ones u + guidance * (c - u). ``rows`` (M,) as a pick."""

    cheap = True  # seeing a row again costs no matrix product

    def __init__(self, logits, uncond, guidance, temperature, rows=None):
        operands = (logits,) if uncond is None else (logits, uncond)
        super().__init__(operands, temperature, rows, *logits.shape)
        self.guidance = guidance
        self.chunk_rows = logits_chunk_rows(self.vocabulary)

    def _pick(self, operand, start, stop):
        picked = operand[start:stop] if self.rows is None else operand.index_select(0, self.rows[start:stop])
        return picked.to(self.dtype)

    def scaled_logits(self, start, stop):
        logits = self._pick(self.operands[0], start, stop)
        if len(self.operands) == 2:
            uncond = self._pick(self.operands[1], start, stop)
            both = logits.isneginf() & uncond.isneginf()
            logits = (uncond + self.guidance * (logits - uncond)).masked_fill_(both, -torch.inf)
        temperature = self.chunk_temperature(start, stop)
        return logits if temperature is None else logits / temperature

    def begin(self, needs):
        # Rows that are not picked keep the zeros.
        make = torch.empty_like if self.rows is None else torch.zeros_like
        shapes = zip(self.operands, needs, strict=True)
        self.buffers = [make(o, memory_format=torch.contiguous_format) if n else None for o, n in shapes]

    def gradient_room(self, start, stop):
        """Where the gradient of a chunk will stand, if it can be computed in place."""
        room = self.buffers[0]
        fits = len(self.operands) == 1 and room is not None and self.rows is None and room.dtype == self.dtype
        return room[start:stop] if fits else None

    def add(self, start, stop, grad_logits):
        if self.gradient_room(start, stop) is not None:
            return  # it was computed in place
        shares = (1.0,) if len(self.operands) == 1 else (self.guidance, 1.0 - self.guidance)
        for buffer, share in zip(self.buffers, shares, strict=True):
            if buffer is None:
                continue
            grad = (grad_logits if share == 1.0 else share * grad_logits).to(buffer.dtype)
            if self.rows is None:
                buffer[start:stop] = grad
            else:
                buffer.index_copy_(0, self.rows[start:stop], grad)


class HeadSource(Source):
    """``hidden @ weight.T + bias``, computed in float32, or float64 when an operand is float64.

    hidden (N, H), weight (V, H), bias (V,) or None. What is frozen costs no memory and no matrix product. With a
    ``shard``, weight and bias are this process's part of the vocabulary.
    """

    cheap = False

    def __init__(self, hidden, weight, bias, temperature, rows=None, shard=None):
        operands = (hidden, weight) if bias is None else (hidden, weight, bias)
        super().__init__(operands, temperature, rows, hidden.shape[0], weight.shape[0])
        self.shard = shard
        # Every process must cut the rows alike, whatever its part of the vocabulary.
        self.chunk_rows = MINIMUM_CHUNK_ROWS if shard else head_chunk_rows(self.vocabulary, self.device)

    def prepare(self):
        self.weight = self.operands[1].to(self.dtype)
        self.bias = self.operands[2].to(self.dtype) if len(self.operands) == 3 else None

    def release(self):
        super().release()
        self.weight = self.bias = None

    def keeps_float16(self):
        return False  # but in the accumulation type

    def hidden_rows(self, start, stop):
        """The hidden states of rows ``start`` to ``stop``: (C, H)."""
        hidden = self.operands[0]
        chosen = hidden[start:stop] if self.rows is None else hidden.index_select(0, self.rows[start:stop])
        return chosen.to(self.dtype)

    def scaled_logits(self, start, stop):
        logits = self.hidden_rows(start, stop) @ self.weight.t()
        if self.bias is not None:
            logits += self.bias
        temperature = self.chunk_temperature(start, stop)
        return logits if temperature is None else logits.div_(temperature)

    def gradient_room(self, start, stop):
        return None

    def begin(self, needs):
        shapes = zip(self.operands, needs, strict=True)
        self.buffers = [torch.zeros(o.shape, dtype=self.dtype, device=self.device) if n else None for o, n in shapes]

    def add(self, start, stop, grad_logits):
        grad_hidden, grad_weight, grad_bias = (*self.buffers, None)[:3]
        if grad_hidden is not None:
            grad = grad_logits @ self.weight
            if self.rows is None:
                grad_hidden[start:stop] = grad
            else:
                grad_hidden.index_copy_(0, self.rows[start:stop], grad)
        if grad_weight is not None:
            grad_weight.addmm_(grad_logits.t(), self.hidden_rows(start, stop))
        if grad_bias is not None:
            grad_bias += grad_logits.sum(dim=0)

    def gradients(self):
        if self.shard is not None and self.buffers[0] is not None:
            self.shard.sum_(self.buffers[0])
        return super().gradients()
