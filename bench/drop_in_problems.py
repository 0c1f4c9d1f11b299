"""The problems of ``drop_in.py``, and what the functions it compares should give, in float64.

Masked positions are taken out before any arithmetic, so that nothing on them can reach a result.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

DEFAULTS = {
    "loss_type": "dapo",
    "level": "token",
    "beta": 0.1,
    "eps_low": 0.2,
    "eps_high": 0.3,
    "delta": None,
    "temperature": 0.9,
    "reduce": True,
    "items": None,
    "inplace": False,
    "ref_given": True,
}


@dataclass
class Problem:
    """B completions of L tokens from a vocabulary of V, as logits and as a linear head."""

    logits: torch.Tensor  # (B, L + 1, V)
    hidden: torch.Tensor  # (B, L, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor  # (V,)
    ids: torch.Tensor  # (B, L)
    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, L)
    old: torch.Tensor | None
    ref: torch.Tensor
    vllm: torch.Tensor | None
    upstream: torch.Tensor  # (B, L), the gradient of per-token losses
    options: dict = field(default_factory=lambda: dict(DEFAULTS))


def make_problem(seed, vocabulary=13, closed=0, batch=3, dtype=torch.float32, old=True, vllm=None, **options):
    """Ratios fall on both sides of the clip. The first ``closed`` tokens are ruled out by a bias of -inf."""
    length = 4
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (t.to(dtype) for t in (normal(batch, length, 5), normal(vocabulary, 5), normal(vocabulary)))
    bias[:closed] = -torch.inf
    ids = torch.randint(closed, vocabulary, (batch, length), generator=generator)
    logits = hidden @ weight.T + bias
    problem = Problem(
        logits=torch.cat([logits, normal(batch, 1, vocabulary).to(dtype)], dim=1),
        hidden=hidden,
        weight=weight,
        bias=bias,
        ids=ids,
        advantages=normal(batch).float(),
        mask=(torch.rand(batch, length, generator=generator) > 0.25).int(),
        old=None,
        ref=None,
        vllm=None if vllm is None else normal(*vllm).mul(0.3).exp().float(),
        upstream=normal(batch, length).float(),
        options={**DEFAULTS, **options},
    )
    own = own_log_probs(problem)
    problem.old = (own + 0.4 * normal(batch, length)).float() if old else None
    problem.ref = (own + 0.4 * normal(batch, length)).float()
    return problem


def own_log_probs(problem):
    """The head's own log-probabilities (B, L), in float64."""
    log_p = (problem.logits[:, :-1].double() / problem.options["temperature"]).log_softmax(-1)
    return log_p.gather(-1, problem.ids[..., None]).squeeze(-1)


def truth(problem, rows):
    """(loss to differentiate, outputs) in float64, from the logits of the rows that count, (M, V)."""
    o, keep = SimpleNamespace(**problem.options), problem.mask != 0
    rows = (rows / o.temperature).log_softmax(-1).gather(-1, problem.ids[keep][:, None]).squeeze(-1)
    log_probs = torch.zeros(keep.shape, dtype=torch.float64).masked_scatter(keep, rows)
    old = log_probs.detach() if problem.old is None else problem.old.double()
    log_ratio = torch.where(keep, log_probs - torch.where(keep, old, 0.0), 0.0)
    if o.level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)).expand(keep.shape)
    ratio, advantages = log_ratio.exp(), problem.advantages.double()[:, None]
    if o.loss_type == "cispo":
        loss = -ratio.clamp(max=o.eps_high).detach() * advantages * log_probs
        clipped = (ratio > o.eps_high) & (advantages > 0)
    else:
        low, high = 1 - o.eps_low, 1 + o.eps_high
        capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        loss = -torch.min(capped * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    if problem.vllm is not None:
        loss = loss * problem.vllm.double().reshape(len(keep), -1)
    gap = torch.where(keep, problem.ref.double(), 0.0) - log_probs
    kl = (torch.expm1(gap) - gap) * keep
    loss, clipped = (loss + o.beta * kl) * keep, clipped * keep
    if not o.reduce:
        return (loss * problem.upstream).sum(), {"loss": loss, "kl": kl, "clipped": clipped.double()}
    count, lengths = keep.sum().clamp(min=1), keep.sum(1).clamp(min=1)
    tokens = count if o.items is None else max(o.items, 1)
    denominators = {"bnpo": count, "dapo": tokens, "cispo": tokens, "dr_grpo": keep.numel(), "luspo": len(keep)}
    loss = (loss.sum(1) / lengths).mean() if o.loss_type == "grpo" else loss.sum() / denominators[o.loss_type]
    metrics = [kl.sum() / count] * (o.beta != 0) + [clipped.sum() / count]
    return loss, {"loss": loss, "metrics": torch.stack(metrics)}


def outputs(loss, named, leaves):
    """The named outputs and the gradients of ``loss`` to the leaves."""
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach().double() for name, tensor in named.items() if tensor is not None}


def z_loss(problem, logits):
    return logits.logsumexp(-1).square().mean() if problem.options["inplace"] else 0.0


def truth_from_logits(problem):
    leaf = problem.logits.detach().double().requires_grad_()
    loss, named = truth(problem, leaf[:, :-1][problem.mask != 0])
    return outputs(loss + z_loss(problem, leaf), named, {"logits": leaf})


def head_rows(problem, keep):
    """The leaves of the head, and the logits (M, V) of the rows that ``keep`` (B, L) picks."""
    leaves = {name: getattr(problem, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")}
    return leaves, leaves["hidden"][keep] @ leaves["weight"].T + leaves["bias"]


def truth_from_hidden(problem):
    leaves, rows = head_rows(problem, problem.mask != 0)
    return outputs(*truth(problem, rows), leaves)


def row_outputs(problem, rows, keep):
    log_p = (rows / problem.options["temperature"]).log_softmax(-1)
    entropies = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
    named = {"log_probs": log_p.gather(-1, problem.ids[keep][:, None]).squeeze(-1), "entropy": entropies}
    named = {name: torch.zeros(keep.shape, dtype=t.dtype).masked_scatter(keep, t) for name, t in named.items()}
    return (sum(named.values()) * problem.upstream).sum(), named


def truth_of_rows(problem):
    leaf, keep = problem.logits.detach().double().requires_grad_(), problem.mask != 0
    return outputs(*row_outputs(problem, leaf[:, :-1][keep], keep), {"logits": leaf})


def truth_of_head(problem):
    keep = torch.ones_like(problem.ids, dtype=torch.bool)
    leaves, rows = head_rows(problem, keep)
    return outputs(*row_outputs(problem, rows, keep), leaves)
