"""Sequences go to other ranks where that evens out the work, and the step stays the same."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from fastcorl.algorithm import CoRLObjective, Packer, PackOptions, StepTotals, pack_rollout, set_advantages
from fastcorl.algorithm.assignment import Cost, assign, balance, load
from fastcorl.errors import UserError
from fastcorl.rollout import take_groups
from tests.helpers import objective_options


class Together:
    """Ranks as threads of one process."""

    def __init__(self, world):
        self.barrier, self.values = Barrier(world, timeout=60), [None] * world

    def of(self, rank):
        return Rank(rank, self)

    def run(self, work, items):
        with ThreadPoolExecutor(len(items)) as threads:
            return list(threads.map(lambda pair: work(self.of(pair[0]), pair[1]), enumerate(items)))


class Rank:
    def __init__(self, rank, together):
        self.rank, self.together = rank, together

    def gather(self, value):
        self.together.values[self.rank] = value
        self.together.barrier.wait()
        values = list(self.together.values)
        self.together.barrier.wait()
        return values


def of_groups(rng, longest, groups=4, size=4):
    return [Cost(group, 20, rng.randint(1, longest)) for group in range(groups) for _ in range(size)]


@pytest.mark.parametrize("capacity", [90, 200, 5000])
@pytest.mark.parametrize("seed", range(4))
def test_the_longest_rank_is_hardly_longer_than_the_mean(capacity, seed):
    rng = random.Random(seed)
    costs = [of_groups(rng, longest) for longest in (60, 10, 40)]
    line = [cost._replace(prefix=(rank, cost.prefix)) for rank, own in enumerate(costs) for cost in own]
    shares = balance(costs, capacity)
    assert [place for share in shares for run in share for place in range(48)[run]] == list(range(48))
    assert len({len(share) for share in shares}) == 1
    assert all(load(line[run]) <= capacity for share in shares for run in share)
    loads = [sum(load(line[run]) for run in share) for share in shares]
    alone = [sum(load(own[run]) for run in assign(own, capacity)) for own in costs]
    # Cut at the granularity of a sequence, and of the prompt that is then there twice.
    assert max(loads) < max(alone)
    assert max(loads) <= sum(loads) / 3 + len(shares[0]) * (60 + 20)


def test_nothing_moves_for_little():
    equal = [[Cost(group, 20, 30) for group in range(3) for _ in range(4)] for _ in range(2)]
    assert balance(equal, 1000) == [[slice(0, 12)], [slice(12, 24)]]
    # One position more is not worth a transfer.
    equal[0][0] = Cost(0, 20, 31)
    assert balance(equal, 1000) == [[slice(0, 12)], [slice(12, 24)]]


def test_a_rank_with_too_few_sequences_gets_some():
    long, short = [Cost(i, 0, 10) for i in range(8)], [Cost(0, 0, 10)]
    shares = balance([long, short], 20)
    assert [[run.stop - run.start for run in share] for share in shares] == [[1, 1, 2], [2, 2, 1]]
    assert balance([long, []], 20) == [[slice(0, 2), slice(2, 4)], [slice(4, 6), slice(6, 8)]]
    with pytest.raises(UserError, match="4 micro-batches for 3 sequences"):
        balance([[Cost(i, 0, 10) for i in range(3)], []], 10)


@pytest.mark.parametrize("tokens", [150, 10_000])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("share_prefix", [False, True], ids=["own prompts", "shared prompts"])
def test_a_step_on_three_ranks_is_the_step_on_one(policy, rollout_of, tokens, guided, share_prefix):
    rollout = rollout_of(5.0, 1.0)
    options = PackOptions(tokens * (2 if guided else 1), guided, share_prefix=share_prefix)
    objective = CoRLObjective(policy, objective_options(guidance=5.0, policy_logits="cfg" if guided else "cond"))
    # Three ranks with the same prompts, one in another order, whose answers are cut; one has none at all.
    lengths = [rollout.texts.lengths, rollout.texts.lengths.clamp(max=2), torch.zeros_like(rollout.texts.lengths)]
    rollouts = [replace(rollout, texts=replace(rollout.texts, lengths=each)) for each in lengths]
    rollouts[0] = take_groups(rollouts[0], range(len(rollout.prompts))[::-1])
    count = rollout.num_rows
    advantages = torch.randn(3 * count, generator=torch.Generator().manual_seed(0))
    totals = StepTotals({"image": 3.0 * count, "text": 3.0 * count}, {"image": 1.0, "text": 1.0})

    packs = Together(3).run(lambda rank, each: Packer(each, options).pack_with(rank), rollouts)
    assert len({len(batches) for batches in packs}) == 1
    positions = [sum(batch.num_tokens for batch in batches) for batches in packs]
    alone = [sum(batch.num_tokens for batch in pack_rollout(each, advantages, options)) for each in rollouts]
    assert max(positions) < max(alone)
    everything = [batch for batches in packs for batch in batches]
    set_advantages(everything, advantages)
    expected = [
        batch
        for rank, each in enumerate(rollouts)
        for batch in pack_rollout(each, advantages[rank * count : (rank + 1) * count], options)
    ]
    assert results(objective, everything, totals) == pytest.approx(results(objective, expected, totals), abs=2e-5)


def results(objective, batches, totals):
    """Loss, gradient norm, and the log-probs captured and computed, of sequences in order of row and modality."""
    weights = [weight for weight in objective.policy.parameters() if weight.requires_grad]
    loss, gradients, found = 0.0, [torch.zeros_like(weight) for weight in weights], []
    for batch in batches:
        value, losses = objective(batch, totals)
        loss += float(value.detach())
        for total, part in zip(gradients, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
            total += 0 if part is None else part
        for modality, result in losses.items():
            rows = getattr(batch, modality)
            for sequence, (start, stop) in enumerate(zip(rows.cu_seqlens[:-1], rows.cu_seqlens[1:], strict=True)):
                gap = (result.log_probs[start:stop] - rows.sampled_log_probs[start:stop]).abs().max()
                found.append((modality, float(rows.advantages[sequence]), int(stop - start), float(gap)))
    norms = [float(gradient.norm()) for gradient in gradients]
    return [loss, *norms, *(value for _, *values in sorted(found) for value in values)]


def test_a_rank_without_any_sequence_is_sent_some(rollout_of):
    rollout = replace(rollout_of(5.0, 1.0), images=None)
    empty = replace(rollout, texts=replace(rollout.texts, lengths=torch.zeros_like(rollout.texts.lengths)))
    options = PackOptions(10_000)
    (alone,) = Packer(rollout, options).pack()
    packs = Together(2).run(lambda rank, each: Packer(each, options).pack_with(rank), [empty, rollout])
    assert [len(batches) for batches in packs] == [1, 1]
    set_advantages([batch for batches in packs for batch in batches], torch.arange(2.0 * rollout.num_rows))
    for field in ("targets", "sampled_log_probs"):
        assert torch.equal(torch.cat([getattr(batch.text, field) for (batch,) in packs]), getattr(alone.text, field))
    advantages = torch.cat([batch.text.advantages for (batch,) in packs])
    assert torch.equal(advantages, rollout.num_rows + alone.text.rows.float())
