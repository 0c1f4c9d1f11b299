"""What is being sampled: drawings and answers in progress, and where their tokens and log-probs go.

Everything a step reads or writes is a tensor on the device, written in place; the host learns how far answers are only
when it asks. Outputs have one row more than there are requests, for rows that are done or only fill up a batch.
"""

from collections.abc import Sequence

import torch

from fastcorl.rollout.sampling import SamplingParams
from fastcorl_kernels import SampledTokens, sample_tokens


class _Rows:
    def __init__(self, total: int, length: int, copies: int, device: torch.device):
        self.length, self.copies = length, copies
        self.nobody = total  # the request that is none
        self.count = 0
        self.tokens = torch.zeros(copies, total, dtype=torch.int64, device=device)  # drawn last, to be fed next
        self.seeds = torch.zeros(total, dtype=torch.int64, device=device)
        self.steps = torch.zeros_like(self.seeds)  # tokens drawn
        self.requests = torch.full_like(self.seeds, self.nobody)
        self.out_tokens = torch.zeros(total + 1, length, dtype=torch.int64, device=device)
        self.out_log_probs = torch.zeros(total + 1, length, device=device)

    def add(self, requests: Sequence[int], seeds: Sequence[int]) -> slice:
        """New rows behind the others; returns which they are."""
        rows = slice(self.count, self.count + len(requests))
        self.requests[rows] = torch.tensor(requests, device=self.seeds.device)
        self.seeds[rows] = torch.tensor(seeds, device=self.seeds.device)
        self.steps[rows] = 0
        self.count = rows.stop
        return rows

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but `rows`, in that order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.seeds.device)
        self.tokens[:, : len(rows)] = self.tokens[:, index]
        for state in (self.seeds, self.steps, self.requests):
            state[: len(rows)] = state[index]
        dropped = slice(len(rows), self.count)
        self.requests[dropped] = self.nobody
        self.steps[dropped] = 0  # a place that exists, should the row be stepped to fill up a batch
        self.count = len(rows)

    def clear(self) -> None:
        """Forget every row, for another call."""
        self.keep([])

    def _draw(
        self, logits: torch.Tensor, params: SamplingParams, rows: slice, uncond: torch.Tensor | None = None
    ) -> SampledTokens:
        """Sample these rows' next tokens and write them, with their log-probs, to where they go."""
        sampled = sample_tokens(
            logits,
            self.seeds[rows],
            self.steps[rows],
            uncond=uncond,
            guidance=params.guidance,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            tokens_out=self.tokens[:, rows],
        )
        place = self.requests[rows], self.steps[rows]
        self.out_tokens.index_put_(place, sampled.tokens)
        self.out_log_probs.index_put_(place, sampled.log_probs)
        return sampled

    def _count_up(self, rows: slice) -> torch.Tensor:
        """These rows' steps, with the one that was drawn; rows of no request stay where they are."""
        steps = self.steps[rows]
        steps += self.requests[rows] != self.nobody
        return steps


class ImageRows(_Rows):
    """Drawings that step together. With guidance a drawing has two `copies`, conditional and unconditional, which are
    fed the same tokens."""

    def __init__(self, total: int, length: int, copies: int, device: torch.device):
        super().__init__(total, length, copies, device)
        self.out_cond_log_probs = torch.zeros_like(self.out_log_probs)

    def sample(self, logits: torch.Tensor, params: SamplingParams, rows: slice) -> None:
        """(copies n, codes) logits, conditional ones first -> the next token of these n rows."""
        cond, uncond = (logits, None) if self.copies == 1 else logits.chunk(2)
        sampled = self._draw(cond, params, rows, uncond)
        self.out_cond_log_probs.index_put_((self.requests[rows], self.steps[rows]), sampled.cond_log_probs)
        self._count_up(rows)


class TextRows(_Rows):
    """Answers, which end on their own: by the end token, or at `length` tokens."""

    def __init__(self, total: int, length: int, end_id: int, device: torch.device):
        super().__init__(total, length, 1, device)
        self.end_id = end_id
        self.out_lengths = torch.zeros(total + 1, dtype=torch.int64, device=device)
        self.out_finished = torch.zeros(total + 1, dtype=torch.bool, device=device)

    def sample(self, logits: torch.Tensor, params: SamplingParams, rows: slice) -> None:
        """(m, vocabulary) logits -> the next token of these m rows; rows that end have no request any more."""
        ended = self._draw(logits, params, rows).tokens == self.end_id
        requests, steps = self.requests[rows], self._count_up(rows)
        self.out_finished.index_put_((requests,), ended)
        self.out_lengths.index_put_((requests,), steps)
        requests.masked_fill_(ended | (steps == self.length), self.nobody)

    def clear(self) -> None:
        super().clear()
        self.out_lengths.zero_()

    def alive(self) -> list[int]:
        """The rows that go on. The host waits for the device."""
        return (self.requests[: self.count] != self.nobody).nonzero().squeeze(-1).tolist()
