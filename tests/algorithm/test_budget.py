"""A budget of answer tokens is filled exactly, at random, and the pack holds what was taken."""

import dataclasses

import pytest
import torch

from fastcorl.algorithm import PackOptions, pack_rollout
from fastcorl.algorithm.budget import budget_lengths

LENGTHS = torch.tensor([5, 1, 9, 4, 7])


@pytest.mark.parametrize("budget", [1, 5, 13, 25])
def test_the_budget_is_filled(budget):
    for seed in range(20):
        taken = budget_lengths(LENGTHS, budget, seed)
        assert int(taken.sum()) == budget
        assert (taken <= LENGTHS).all()
        assert int(((taken > 0) & (taken < LENGTHS)).sum()) <= 1  # only the last one taken is cut


def test_less_than_the_budget_is_taken_whole():
    assert torch.equal(budget_lengths(LENGTHS, 27, 0), LENGTHS)


def test_every_answer_has_its_turn_and_a_seed_repeats():
    taken = torch.stack([budget_lengths(LENGTHS, 9, seed) for seed in range(200)])
    assert torch.equal(taken, torch.stack([budget_lengths(LENGTHS, 9, seed) for seed in range(200)]))
    often = (taken > 0).float().mean(0)
    assert (often > 0.2).all() and (often < 0.9).all()


def test_the_pack_holds_what_was_taken(rollout_of):
    rollout = rollout_of(1.0)
    whole = rollout.texts.lengths
    taken = budget_lengths(whole, int(whole.sum()) // 2, 3)
    cut = dataclasses.replace(rollout, texts=dataclasses.replace(rollout.texts, lengths=taken))
    (batch,) = pack_rollout(cut, torch.arange(rollout.num_rows, dtype=torch.float32), PackOptions(10_000))
    assert batch.text.cu_seqlens.diff().tolist() == [length for length in taken.tolist() if length]
    assert batch.text.advantages.tolist() == [row for row, length in enumerate(taken.tolist()) if length]
    answers = [rollout.texts.tokens[row, :length] for row, length in enumerate(taken.tolist()) if length]
    assert torch.equal(batch.text.targets, torch.cat(answers))
