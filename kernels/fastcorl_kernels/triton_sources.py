"""The sources of ``sources.py`` on Triton: row kernels for the softmax and the loss, cuBLAS for the products."""

import functools

import torch

from fastcorl_kernels.chunking import MINIMUM_CHUNK_ROWS, row_spans, workspace_rows
from fastcorl_kernels.grpo.objective import GRPOLoss, log_prob_gradient, summarize, token_terms
from fastcorl_kernels.grpo.triton_kernels import TERMS, loss_rows, scale_gradient, summarize_terms
from fastcorl_kernels.linear_log_softmax.triton_kernels import target_logits
from fastcorl_kernels.log_softmax.triton_kernels import row_gradients, row_log_probs
from fastcorl_kernels.sources import HeadSource, LogitsSource, over

HALF = (torch.float16, torch.bfloat16)


def grpo_result(log_probs, terms, batch):
    """``GRPOLoss`` without a graph from the log-probabilities (M,) and terms (5, M) of the rows of ``batch``."""
    loss, entropy, kl, clip_fraction, ratio_max = summarize_terms(terms, batch.mask)
    if batch.ref_log_probs is None:
        kl = None
    return GRPOLoss(loss, batch.scatter(log_probs), entropy, kl, clip_fraction, ratio_max)


class _TritonScale:
    def scale(self, gradient, grad_loss, dtype, peak):
        return scale_gradient(gradient, grad_loss.reshape(1), dtype, peak)


class TritonLogitsSource(_TritonScale, LogitsSource):
    """Given logits: one launch over all rows, no chunks."""

    def _guided(self):
        if len(self.operands) == 1:
            return {}
        return {"uncond": self.operands[1], "guidance": self.guidance}

    def log_probs(self, index, want_entropy):
        return row_log_probs(self.operands[0], index, self.temperature, want_entropy, rows=self.rows, **self._guided())

    def differentiate(self, state, index, grad_log_probs, needs, entropy=None, grad_entropy=None):
        self.begin(needs)
        row_gradients(
            self.operands[0],
            index,
            self.temperature,
            state,
            grad_log_probs,
            self.buffers[0],
            entropy=entropy,
            grad_entropy=grad_entropy,
            rows=self.rows,
            uncond_out=self.buffers[1] if len(self.buffers) == 2 else None,
            **self._guided(),
        )
        return self.gradients()

    def grpo(self, batch, settings, needs):
        if settings.importance == "sequence":
            return self.two_passes(batch, settings, needs)
        log_probs = torch.empty(self.count, dtype=torch.float32, device=self.device)
        terms = torch.empty(TERMS, self.count, dtype=torch.float32, device=self.device)
        peak = None
        if any(needs):
            self.begin(needs)
            peak = self.peak(batch.weights)
        loss_rows(
            self.operands[0],
            batch,
            settings,
            log_probs,
            terms,
            self.buffers[0],
            mask=batch.mask,
            grad_uncond=self.buffers[1] if len(self.buffers) == 2 else None,
            peak=peak,
            **self._guided(),
        )
        return grpo_result(log_probs, terms, batch), self.gradients(), peak


class TritonHeadSource(_TritonScale, HeadSource):
    """A linear head: per chunk one product into a workspace, which the row kernel turns into its gradient in place.

    The products run in the operands' own type and accumulate in float32, as does the weight gradient over the chunks.
    The logit of the drawn token is computed again in float32: rounding it to 16 bits would cost its log-probability
    three digits, and its gradient all of them where its probability is near 1.
    """

    def prepare(self):
        dtype = torch.promote_types(self.operands[0].dtype, self.operands[1].dtype)
        hidden = self.operands[0] if self.rows is None else self.operands[0].index_select(0, self.rows)
        self.hidden = hidden.to(dtype).contiguous()
        self.weight = self.operands[1].to(dtype)
        self.bias = self.operands[2] if len(self.operands) == 3 else None
        self.dtype = torch.float32

    def release(self):
        super().release()
        self.hidden = None

    def keeps_float16(self):
        return self.hidden.dtype == torch.float16

    def step(self, trained):
        """Rows of a chunk; on every process of a shard the same."""
        if self.shard is not None:
            return MINIMUM_CHUNK_ROWS
        return workspace_rows(self.vocabulary, self.count, trained)

    def workspaces(self, spans):
        """(start, stop, logits (C, V)) per chunk; every chunk overwrites the one before."""
        rows = max((stop - start for start, stop in spans), default=0)
        # Rows that start on 16 elements keep loads wide and products fast.
        width = -(-self.vocabulary // 16) * 16
        workspace = torch.empty(rows, width, dtype=self.hidden.dtype, device=self.device)[:, : self.vocabulary]
        for start, stop in spans:
            logits = workspace[: stop - start]
            if self.bias is None:
                torch.mm(self.hidden[start:stop], self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias.to(logits.dtype), self.hidden[start:stop], self.weight.t(), out=logits)
            yield start, stop, logits

    def local_index(self, index):
        """Ids within this process's part of the vocabulary; -1 for those of another."""
        if self.shard is None:
            return index
        local, hit = self.shard.local(index)
        return torch.where(hit, local, -1)

    def targets(self, index):
        """Float32 logits (M,) of the drawn tokens; None where the workspace has them as exactly."""
        if self.hidden.dtype not in HALF and self.shard is None:
            return None
        return target_logits(self.hidden, self.weight, self.bias, index)

    def statistics(self, logits, index, target, temperature, want_entropy=True):
        """(logsumexp, log_probs, entropy) of a chunk over the whole vocabulary."""
        if self.shard is None:
            return row_log_probs(logits, index, temperature, want_entropy, target=target)
        lse, _, entropy = row_log_probs(logits, index, temperature, True, target=target)
        return self.shard.combine(lse, target / temperature, entropy)

    def log_probs(self, index, want_entropy):
        local = self.local_index(index)
        target = self.targets(local)
        wholes = [torch.empty(self.count, dtype=torch.float32, device=self.device) for _ in range(3)]
        for start, stop, logits in self.workspaces(row_spans(self.count, self.step(trained=False))):
            part = slice(start, stop)
            chunk_target = None if target is None else target[part]
            temperature = self.chunk_temperatures(part)
            results = self.statistics(logits, local[part], chunk_target, temperature, want_entropy)
            for whole, result in zip(wholes, results, strict=True):
                if result is not None:
                    whole[part] = result
        lse, log_probs, entropy = wholes
        return lse, log_probs, entropy if want_entropy else None

    def differentiate(self, state, index, grad_log_probs, needs, entropy=None, grad_entropy=None):
        self.begin(needs)
        local = self.local_index(index)
        target = self.targets(local)
        upstreams = grad_log_probs if grad_entropy is None else torch.cat([grad_log_probs, grad_entropy])
        peak = self.peak(upstreams)
        grad_log_probs = over(grad_log_probs, peak)
        grad_entropy = None if grad_entropy is None else over(grad_entropy, peak)
        for start, stop, logits in self.workspaces(row_spans(self.count, self.step(trained=needs[1]))):
            part = slice(start, stop)
            row_gradients(
                logits,
                local[part],
                self.chunk_temperatures(part),
                state[part],
                grad_log_probs[part],
                logits,
                entropy=None if grad_entropy is None else entropy[part],
                grad_entropy=None if grad_entropy is None else grad_entropy[part],
                target=None if target is None else target[part],
            )
            self.add(start, stop, logits)
        gradients = self.gradients()
        return gradients if peak is None else [None if g is None else g.float() * peak for g in gradients]

    def chunk_temperatures(self, part):
        return self.temperature[part] if isinstance(self.temperature, torch.Tensor) else self.temperature

    def grpo(self, batch, settings, needs):
        self.chunk_rows = self.step(trained=needs[1])
        spans = self.loss_spans(batch, settings)
        if spans is None:
            return self.two_passes(batch, settings, needs)
        fused = settings.importance == "token" and self.shard is None
        wants_gradient = any(needs)
        peak = self.peak(batch.weights) if wants_gradient else None
        if wants_gradient:
            self.begin(needs)
        index = self.local_index(batch.token_ids)
        target = self.targets(index)
        log_probs = torch.empty(self.count, dtype=torch.float32, device=self.device)
        terms = torch.empty(TERMS, self.count, dtype=torch.float32, device=self.device)
        entropy = terms[1]
        workspaces = self.workspaces([span[:2] for span in spans])
        for (start, stop, logits), (_, _, span) in zip(workspaces, spans, strict=True):
            part = slice(start, stop)
            chunk_target = None if target is None else target[part]
            if fused:
                grad_logits = logits if wants_gradient else None
                loss_rows(
                    logits, span, settings, log_probs[part], terms[:, part], grad_logits, target=chunk_target, peak=peak
                )
            else:
                results = self.statistics(logits, index[part], chunk_target, self.temperature)
                lse, log_probs[part], entropy[part] = results
                if wants_gradient:
                    gradient = log_prob_gradient(
                        token_terms(log_probs[part], span, settings), span.weights, span, settings
                    )
                    upstream = over(gradient, peak)
                    row_gradients(logits, index[part], self.temperature, lse, upstream, logits, target=chunk_target)
            if wants_gradient:
                self.add(start, stop, logits)
        if fused:
            result = grpo_result(log_probs, terms, batch)
        else:
            result = summarize(token_terms(log_probs, batch, settings), entropy, batch)
        return result, self.gradients(), peak

    def begin(self, needs):
        hidden, weight, *bias = self.operands
        self.buffers = [
            torch.empty_like(self.hidden) if needs[0] else None,
            torch.empty(weight.shape, dtype=torch.float32, device=self.device) if needs[1] else None,
            *(torch.zeros(b.shape, dtype=torch.float32, device=self.device) if needs[2] else None for b in bias),
        ]

    def add(self, start, stop, grad_logits):
        grad_hidden, grad_weight, grad_bias = (*self.buffers, None)[:3]
        if grad_hidden is not None:
            torch.mm(grad_logits, self.weight, out=grad_hidden[start:stop])
        if grad_weight is not None:
            add_product(grad_weight, grad_logits.t(), self.hidden[start:stop], first=start == 0)
        if grad_bias is not None:
            grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)

    def gradients(self):
        grad_hidden, *rest = super().gradients()
        if grad_hidden is not None and self.rows is not None:
            hidden = self.operands[0]
            grad_hidden = hidden.new_zeros(hidden.shape, dtype=grad_hidden.dtype).index_copy_(0, self.rows, grad_hidden)
        return [grad_hidden, *rest]


def add_product(total, left, right, first):
    """``total += left @ right``, or ``total = left @ right`` if ``first``.

    total (V, H) is float32, whatever the type of left (V, C) and right (C, H).
    """
    if left.dtype != torch.float32 and not mixes_types(total.device):
        left, right = left.float(), right.float()
    mixed = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
    if first:
        torch.mm(left, right, **mixed, out=total)
    else:
        torch.addmm(total, left, right, **mixed, out=total)


@functools.cache
def mixes_types(device):
    """Whether torch's products take 16-bit operands into a float32 sum: from torch 2.8, on NVIDIA from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    known = all("dtype_out" in product.overloads() for product in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return known and torch.cuda.get_device_capability(device) >= (8, 0)
