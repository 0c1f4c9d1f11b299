"""The expressions that trainers write in plain torch, eager and through torch.compile; in float64, the reference."""

import torch

from bench.peers.contestant import Contestant
from bench.peers.settings import BETA, EPS


def log_probs_of(logits, token_ids):
    """(N, V) to (N,), in float32 or, for float64 logits, in float64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=dtype).gather(-1, token_ids[:, None]).squeeze(-1)


def objective(log_probs, rows):
    """The GRPO loss of (N,) log-probabilities as TRL writes it."""
    log_probs = rows.by_sequence(log_probs)
    advantages = rows.advantages[:, None]
    ratio = torch.exp(log_probs - rows.by_sequence(rows.old_log_probs))
    per_token = -torch.min(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)
    gap = rows.by_sequence(rows.ref_log_probs) - log_probs
    per_token = per_token + BETA * (torch.exp(gap) - gap - 1)
    if rows.mask is None:
        return per_token.mean(-1).mean()
    mask = rows.by_sequence(rows.mask)
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def log_softmax(problem):
    return Contestant(lambda *leaves: log_probs_of(problem.logits_of(*leaves), problem.rows.token_ids), problem.leaves)


def grpo(problem):
    def loss(*leaves):
        return objective(log_probs_of(problem.logits_of(*leaves), problem.rows.token_ids), problem.rows)

    return Contestant(loss, problem.leaves)


def compiled(provider):
    """The same expression through torch.compile, for static shapes."""

    def build(problem):
        torch.compiler.reset()  # otherwise earlier shapes count towards the limit of recompilations
        contestant = provider(problem)
        return Contestant(torch.compile(contestant.function, dynamic=False, fullgraph=True), contestant.leaves)

    return build


def exact(provider, problem):
    """The provider on float64 copies of the leaves."""
    contestant = provider(problem)
    leaves = tuple(leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in contestant.leaves)
    return Contestant(contestant.function, leaves)


def group_advantages(problem):
    def advantages(rewards):
        totals = rewards.sum(dim=1)
        groups = totals.view(-1, problem.group_size)
        mean = groups.mean(dim=1).repeat_interleave(problem.group_size)
        deviation = groups.std(dim=1).repeat_interleave(problem.group_size)
        return (totals - mean) / (deviation + 1e-4)

    return Contestant(advantages, problem.leaves)
