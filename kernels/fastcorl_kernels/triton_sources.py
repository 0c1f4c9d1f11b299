"""The sources of ``sources.py`` on Triton: row kernels for the softmax and the loss, cuBLAS for the products."""

import torch

from fastcorl_kernels.chunking import row_spans, workspace_rows
from fastcorl_kernels.grpo.objective import GRPOLoss, log_prob_gradient, summarize
from fastcorl_kernels.grpo.triton_kernels import TERMS, loss_rows, scale_gradient, summarize_terms
from fastcorl_kernels.linear_log_softmax.triton_kernels import target_logits
from fastcorl_kernels.log_softmax.triton_kernels import row_gradients, row_log_probs
from fastcorl_kernels.sources import HeadSource, LogitsSource

HALF = (torch.float16, torch.bfloat16)


def grpo_result(terms, batch):
    """``GRPOLoss`` without a graph from the terms (6, M) of the rows of ``batch``."""
    loss, entropy, kl, clip_fraction, ratio_max = summarize_terms(terms, batch.mask).unbind()
    if batch.ref_log_probs is None:
        kl = None
    return GRPOLoss(loss, batch.scatter(terms[TERMS - 1]), entropy, kl, clip_fraction, ratio_max)


class _TritonScale:
    def scale(self, gradient, grad_loss, dtype, grad_scale):
        return scale_gradient(gradient, grad_loss.reshape(1), dtype, grad_scale)


class TritonLogitsSource(_TritonScale, LogitsSource):
    """Given logits: one launch over all rows, no chunks."""

    def _guided(self):
        return {"uncond": self.operands[1] if len(self.operands) == 2 else None, "guidance": self.guidance}

    def log_probs(self, index, want_entropy):
        return row_log_probs(self.operands[0], index, self.temperature, want_entropy, rows=self.rows, **self._guided())

    def differentiate(self, state, index, grad_log_probs, needs, entropy=None, grad_entropy=None):
        self.begin([True] * len(self.operands))
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
        return [gradient if need else None for gradient, need in zip(self.gradients(), needs, strict=True)]

    def grpo(self, batch, settings, needs):
        if settings.importance == "sequence":
            return super().grpo(batch, settings, needs)
        terms = torch.empty(TERMS, self.count, dtype=torch.float32, device=self.device)
        if any(needs):
            self.begin([True] * len(self.operands))
        loss_rows(
            self.operands[0],
            batch.token_ids,
            (batch.advantages, batch.weights),
            batch.old_log_probs,
            batch.ref_log_probs,
            settings,
            terms,
            self.buffers[0],
            mask=batch.mask,
            grad_uncond=self.buffers[1] if len(self.buffers) == 2 else None,
            **self._guided(),
        )
        gradients = [g if need else None for g, need in zip(self.gradients(), needs, strict=True)]
        return grpo_result(terms, batch), gradients, 1.0


class TritonHeadSource(_TritonScale, HeadSource):
    """A linear head: per chunk one product into a workspace, which the row kernel turns into its gradient in place.

    The products run in the operands' own type and accumulate in float32, as does the weight gradient over the chunks.
    The logit of the drawn token is computed again in float32, so that rounding the workspace to 16 bits costs neither
    its log-probability nor its gradient a digit.
    """

    def prepare(self):
        dtype = torch.promote_types(self.operands[0].dtype, self.operands[1].dtype)
        hidden = self.operands[0] if self.rows is None else self.operands[0].index_select(0, self.rows)
        self.hidden = hidden.to(dtype).contiguous()
        self.weight = self.operands[1].to(dtype)
        self.bias = self.operands[2].to(dtype) if len(self.operands) == 3 else None
        self.dtype = torch.float32
        # float16 has no room for a gradient divided by the number of rows.
        self.grad_scale = 2.0 ** (max(self.count, 1).bit_length()) if dtype == torch.float16 else 1.0

    def spans(self, trained):
        return row_spans(self.count, workspace_rows(self.vocabulary, self.count, trained))

    def workspaces(self, spans):
        """(start, stop, logits (C, V)) per chunk; every chunk overwrites the one before."""
        rows = max((stop - start for start, stop in spans), default=0)
        workspace = torch.empty(rows, self.vocabulary, dtype=self.hidden.dtype, device=self.device)
        for start, stop in spans:
            logits = workspace[: stop - start]
            if self.bias is None:
                torch.mm(self.hidden[start:stop], self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, self.hidden[start:stop], self.weight.t(), out=logits)
            yield start, stop, logits

    def local_index(self, index):
        """Ids within this process's part of the vocabulary; -1 for those of another."""
        if self.shard is None:
            return index
        local, hit = self.shard.local(index)
        return torch.where(hit, local, -1)

    def targets(self, index):
        """Float32 logits (M,) of the drawn tokens; None where the workspace is float32 anyway."""
        if self.hidden.dtype not in HALF:
            return None
        return target_logits(self.hidden, self.weight, self.bias, index)

    def statistics(self, logits, index, target, temperature, want_entropy=True):
        """(logsumexp, log_probs, entropy) of a chunk over the whole vocabulary."""
        lse, log_probs, entropy = row_log_probs(
            logits, index, temperature, want_entropy or self.shard is not None, target=target
        )
        return (lse, log_probs, entropy) if self.shard is None else self.shard.combine(lse, log_probs + lse, entropy)

    def log_probs(self, index, want_entropy):
        local = self.local_index(index)
        target = self.targets(local)
        lse, log_probs, entropy = torch.empty(3, self.count, dtype=torch.float32, device=self.device).unbind(0)
        for start, stop, logits in self.workspaces(self.spans(trained=False)):
            part = slice(start, stop)
            chunk_target = None if target is None else target[part]
            temperature = self.chunk_temperatures(part)
            results = self.statistics(logits, local[part], chunk_target, temperature, want_entropy)
            for whole, result in zip((lse, log_probs, entropy), results, strict=True):
                if result is not None:
                    whole[part] = result
        return lse, log_probs, entropy if want_entropy else None

    def differentiate(self, state, index, grad_log_probs, needs, entropy=None, grad_entropy=None):
        self.begin(needs)
        local = self.local_index(index)
        target = self.targets(local)
        for start, stop, logits in self.workspaces(self.spans(trained=needs[1])):
            part = slice(start, stop)
            row_gradients(
                logits,
                local[part],
                self.chunk_temperatures(part),
                state[part],
                grad_log_probs[part] * self.grad_scale,
                logits,
                entropy=None if entropy is None else entropy[part],
                grad_entropy=None if grad_entropy is None else grad_entropy[part] * self.grad_scale,
                target=None if target is None else target[part],
            )
            self.add(start, stop, logits)
        gradients = self.gradients()
        if self.grad_scale != 1.0:
            gradients = [None if g is None else g.float().div_(self.grad_scale) for g in gradients]
        return gradients

    def chunk_temperatures(self, part):
        return self.temperature[part] if isinstance(self.temperature, torch.Tensor) else self.temperature

    def grpo(self, batch, settings, needs):
        self.chunk_rows = workspace_rows(self.vocabulary, self.count, needs[1])
        spans = self.loss_spans(batch, settings)
        if spans is None:
            return super().grpo(batch, settings, needs)
        fused = settings.importance == "token" and self.shard is None
        wants_gradient = any(needs)
        if wants_gradient:
            self.begin(needs)
        index = self.local_index(batch.token_ids)
        target = self.targets(index)
        terms = torch.empty(TERMS, self.count, dtype=torch.float32, device=self.device)
        entropy, log_probs = terms[1], terms[TERMS - 1]
        workspaces = self.workspaces([span[:2] for span in spans])
        for (start, stop, logits), (_, _, span) in zip(workspaces, spans, strict=True):
            ids = index[start:stop]
            chunk_target = None if target is None else target[start:stop]
            if fused:
                loss_rows(
                    logits,
                    ids,
                    (span.advantages, span.weights),
                    span.old_log_probs,
                    span.ref_log_probs,
                    settings,
                    terms[:, start:stop],
                    logits if wants_gradient else None,
                    target=chunk_target,
                    grad_scale=self.grad_scale,
                )
            else:
                results = self.statistics(logits, ids, chunk_target, self.temperature)
                lse, log_probs[start:stop], entropy[start:stop] = results
                if wants_gradient:
                    upstream = log_prob_gradient(log_probs[start:stop], span, settings) * self.grad_scale
                    row_gradients(logits, ids, self.temperature, lse, upstream, logits, target=chunk_target)
            if wants_gradient:
                self.add(start, stop, logits)
        result = grpo_result(terms, batch) if fused else summarize(log_probs, entropy, batch, settings)
        return result, self.gradients(), self.grad_scale

    def begin(self, needs):
        hidden, weight, *bias = self.operands
        self.buffers = [
            torch.empty_like(self.hidden) if needs[0] else None,
            torch.zeros(weight.shape, dtype=torch.float32, device=self.device) if needs[1] else None,
            *(torch.zeros(b.shape, dtype=torch.float32, device=self.device) if needs[2] else None for b in bias),
        ]

    def add(self, start, stop, grad_logits):
        grad_hidden, grad_weight, grad_bias = (*self.buffers, None)[:3]
        if grad_hidden is not None:
            torch.mm(grad_logits, self.weight, out=grad_hidden[start:stop])
        if grad_weight is not None:
            accumulate_product(grad_weight, grad_logits.t(), self.hidden[start:stop])
        if grad_bias is not None:
            grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)

    def gradients(self):
        grad_hidden, *rest = super().gradients()
        if grad_hidden is not None and self.rows is not None:
            hidden = self.operands[0]
            grad_hidden = hidden.new_zeros(hidden.shape, dtype=grad_hidden.dtype).index_copy_(0, self.rows, grad_hidden)
        return [grad_hidden, *rest]


def accumulate_product(total, left, right):
    """``total += left @ right`` with float32 ``total`` (V, H), whatever the type of left (V, C) and right (C, H)."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
