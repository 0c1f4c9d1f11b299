"""Tensors for a shape: logits or hidden states with random, peaked distributions, and tokens drawn from them."""

from dataclasses import dataclass

import torch

# Spread of the logits: wide enough that the whole row of a gradient weighs in its norm, not only the chosen token.
LOGIT_STD = 3.0


@dataclass(frozen=True)
class Rows:
    """What a GRPO loss knows of N rows besides their logits, for S equally long sequences."""

    token_ids: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (S,)
    old_log_probs: torch.Tensor  # (N,) float32
    ref_log_probs: torch.Tensor  # (N,) float32
    mask: torch.Tensor | None  # (N,) bool
    upstream: torch.Tensor  # (N,) float32, a gradient for log-probabilities

    def by_sequence(self, values):
        """(N, ...) to (S, N / S, ...)."""
        return values.view(self.advantages.shape[0], -1, *values.shape[1:])

    @property
    def cu_seqlens(self):
        count, sequences = self.token_ids.shape[0], self.advantages.shape[0]
        return torch.arange(0, count + 1, count // sequences, device=self.token_ids.device)

    @property
    def kept(self):
        return self.token_ids.shape[0] if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True)
class LogitsProblem:
    logits: torch.Tensor  # (N, V), wants a gradient
    rows: Rows

    @property
    def leaves(self):
        return (self.logits,)

    @staticmethod
    def logits_of(logits):
        return logits


@dataclass(frozen=True)
class LinearProblem:
    hidden: torch.Tensor  # (N, H), wants a gradient
    weight: torch.Tensor  # (V, H), wants one if the head is trained
    rows: Rows

    @property
    def leaves(self):
        return self.hidden, self.weight

    @staticmethod
    def logits_of(hidden, weight):
        return hidden @ weight.T


@dataclass(frozen=True)
class RewardProblem:
    rewards: torch.Tensor  # (prompts * group_size, columns)
    group_size: int

    @property
    def leaves(self):
        return (self.rewards,)


def reward_problem(shape):
    generator = torch.Generator(shape.device).manual_seed(0)
    rewards = _randn((shape.prompts * shape.group_size, shape.columns), torch.float32, generator)
    return RewardProblem(rewards, shape.group_size)


def logits_problem(shape):
    generator = torch.Generator(shape.device).manual_seed(0)
    logits = _randn((shape.rows, shape.vocabulary), shape.dtype, generator).mul_(LOGIT_STD)
    return LogitsProblem(logits.requires_grad_(), _rows(shape, logits.detach().float(), generator))


def linear_problem(shape):
    generator = torch.Generator(shape.device).manual_seed(0)
    hidden = _randn((shape.rows, shape.hidden), shape.dtype, generator)
    weight = _randn((shape.vocabulary, shape.hidden), shape.dtype, generator).mul_(LOGIT_STD / shape.hidden**0.5)
    rows = _rows(shape, hidden.float() @ weight.float().T, generator)
    return LinearProblem(hidden.requires_grad_(), weight.requires_grad_(shape.trained), rows)


def _randn(size, dtype, generator):
    return torch.randn(size, dtype=dtype, generator=generator, device=generator.device)


def _rows(shape, logits, generator):
    """Tokens sampled from ``logits``, with log-ratios to the old policy well inside or well outside of the clip.

    A log-ratio near the clip's edge would let bfloat16's rounding decide which rows get a gradient.
    """
    log_p = logits.log_softmax(-1)
    token_ids = torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)
    own = log_p.gather(1, token_ids[:, None]).squeeze(1)
    near, kind = torch.rand((2, shape.rows), generator=generator, device=shape.device)
    drift = torch.where(kind < 0.05, -0.5, torch.where(kind > 0.95, 0.5, 0.2 * near - 0.1))
    return Rows(
        token_ids=token_ids,
        advantages=_randn((shape.sequences,), torch.float32, generator),
        old_log_probs=own - drift,
        ref_log_probs=own + _randn((shape.rows,), torch.float32, generator).mul_(0.1),
        mask=_completion_mask(shape),
        upstream=_randn((shape.rows,), torch.float32, generator),
    )


def _completion_mask(shape):
    """Completions of different lengths, ``kept`` of the rows in all; None when all rows count."""
    if shape.kept == 1.0:
        return None
    longest = shape.rows // shape.sequences
    share = shape.kept * torch.linspace(0.5, 1.5, shape.sequences, device=shape.device)
    return (torch.arange(longest, device=shape.device) < (share * longest)[:, None]).flatten()
