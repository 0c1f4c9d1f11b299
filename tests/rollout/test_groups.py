"""Cutting rollouts into groups and joining them loses and mixes up nothing."""

import pytest
import torch

from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.rollout.groups import interleave, join_groups, take_groups


@pytest.fixture(scope="module")
def rollout(policy, prompts):
    return RolloutEngine(policy).generate(prompts, 3, SamplingParams(guidance=2.0, max_new_tokens=12), seed=1)


def rows_of(rollout):
    """Everything that belongs to a row, row by row."""
    for row in range(rollout.num_rows):
        group = row // rollout.group_size
        length = int(rollout.texts.lengths[row])
        yield (
            rollout.prompt_of(row).id,
            rollout.draw_ids[group],
            rollout.uncond_ids[group],
            rollout.ask_ids[group],
            rollout.vision_features[group].sum().item(),
            rollout.images.tokens[row].tolist(),
            rollout.images.log_probs[row].tolist(),
            rollout.images.pixels[row].sum().item(),
            rollout.texts.tokens[row, :length].tolist(),
            rollout.texts.log_probs[row, :length].tolist(),
            rollout.texts.answers[row],
            bool(rollout.texts.finished[row]),
        )


def test_parts_joined_are_the_whole(rollout):
    parts = [take_groups(rollout, groups) for groups in ([0], [1, 2], [3, 4])]
    assert list(rows_of(join_groups(parts))) == list(rows_of(rollout))


def test_groups_come_in_the_order_asked_for(rollout):
    rows = list(rows_of(rollout))
    assert list(rows_of(take_groups(rollout, [4, 1]))) == rows[12:15] + rows[3:6]


def test_answers_of_other_lengths_are_padded(policy, prompts, rollout):
    longer = RolloutEngine(policy).generate(prompts, 3, SamplingParams(guidance=2.0, max_new_tokens=20), seed=1)
    joined = join_groups([take_groups(rollout, [0]), take_groups(longer, [0])])
    assert list(rows_of(joined)) == list(rows_of(rollout))[:3] + list(rows_of(longer))[:3]
    beyond = torch.arange(joined.texts.tokens.shape[1]) >= joined.texts.lengths[:, None]
    assert (joined.texts.log_probs[beyond] == 0).all()


def test_groups_grow_by_the_rows_of_another_rollout(policy, prompts, rollout):
    other = RolloutEngine(policy).generate(prompts, 1, SamplingParams(guidance=2.0, max_new_tokens=12), seed=2)
    joined = interleave(rollout, other)
    assert joined.group_size == 4
    ours, theirs = list(rows_of(rollout)), list(rows_of(other))
    assert list(rows_of(joined)) == [row for i in range(5) for row in [*ours[3 * i : 3 * i + 3], theirs[i]]]


def test_a_missing_modality_stays_missing(policy, prompts):
    drawn = RolloutEngine(policy).generate(prompts, 2, SamplingParams(), answer=False)
    assert join_groups([take_groups(drawn, [1]), take_groups(drawn, [0])]).texts is None
