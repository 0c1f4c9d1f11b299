import copy
import random

import pytest
import torch

from fastcorl.algorithm import PackOptions, pack_rollout
from fastcorl.algorithm.assignment import Cost, assign, load
from fastcorl.errors import UserError
from tests.helpers import NUM_IMAGE_TOKENS

# Runs


def alone(*lengths):
    """Sequences that share nothing."""
    return [Cost(index, 0, length) for index, length in enumerate(lengths)]


def loads_of(costs, runs):
    return [load(costs[run]) for run in runs]


@pytest.mark.parametrize("capacity", [70, 97, 250, 2000])
@pytest.mark.parametrize("min_bins", [1, 3, 30])
@pytest.mark.parametrize("seed", range(5))
def test_runs(capacity, min_bins, seed):
    rng = random.Random(seed)
    costs = [Cost(group, 30, rng.randint(1, 40)) for group in range(6) for _ in range(5)]
    runs = assign(costs, capacity, min_bins)
    assert [index for run in runs for index in range(30)[run]] == list(range(30))
    assert all(run.stop > run.start for run in runs)
    loads = loads_of(costs, runs)
    assert max(loads) <= capacity
    assert len(runs) >= min_bins
    # No other way to cut the line into so many runs has a smaller largest one.
    assert max(loads) == min_largest(costs, len(runs))
    if len(runs) > min_bins:
        assert min_largest(costs, len(runs) - 1) > capacity


def min_largest(costs, count):
    """The smallest possible largest load of `count` runs, by dynamic programming."""
    length = len(costs)
    load = {
        (start, stop): loads_of(costs, [slice(start, stop)])[0]
        for start in range(length)
        for stop in range(start + 1, length + 1)
    }
    best = [load[0, stop] for stop in range(1, length + 1)]
    for number in range(2, count + 1):
        best = [
            min(
                (max(best[cut - 1], load[cut, stop]) for cut in range(number - 1, stop)),
                default=float("inf"),
            )
            for stop in range(1, length + 1)
        ]
    return best[-1]


def test_runs_are_as_many_as_asked_for_when_others_need_more():
    costs = alone(*[10] * 12)
    assert [len(assign(costs, 60, count)) for count in (1, 2, 3, 12)] == [2, 2, 3, 12]
    assert [run.stop - run.start for run in assign(costs, 60, 4)] == [3, 3, 3, 3]
    # No limit gives three runs here: with 5 there are four, with 6 two.
    assert [len(assign(alone(3, 3, 3, 3), 100, count)) for count in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_a_group_is_cut_only_where_the_load_asks_for_it():
    costs = [Cost(group, 100, 10) for group in "ab" for _ in range(4)]
    assert assign(costs, 280) == [slice(0, 8)]
    assert assign(costs, 279) == [slice(0, 4), slice(4, 8)]
    assert loads_of(costs, assign(costs, 130)) == [120] * 4


def test_a_sequence_that_is_too_long_is_the_users_mistake():
    with pytest.raises(UserError, match="packing.tokens is 9, but one sequence has 10 tokens"):
        assign([Cost("a", 1, 2), Cost("b", 6, 4)], 9)
    with pytest.raises(UserError, match="3 micro-batches for 2 sequences"):
        assign(alone(3, 3), 9, 3)


# Packs


@pytest.mark.parametrize("share_prefix", [False, True], ids=["own prompts", "shared prompts"])
@pytest.mark.parametrize("image_shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("tokens", [100, 230, 10_000])
@pytest.mark.parametrize("modalities", ["both", "images", "texts"])
def test_every_token_is_in_one_row_with_its_advantage(
    rollout_of, policy, tokens, guided, image_shift, share_prefix, modalities
):
    rollout = copy.copy(rollout_of(5.0, 1.0))
    if modalities == "images":
        rollout.texts = None
    if modalities == "texts":
        rollout.images = None
    advantages = torch.randn(rollout.num_rows, generator=torch.Generator().manual_seed(0))
    options = PackOptions(tokens, guided, image_shift, share_prefix)
    batches = pack_rollout(rollout, advantages, options)
    assert (len(batches) == 1) == (tokens == 10_000)
    seen = {"image": [], "text": []}
    row_of = {float(value): row for row, value in enumerate(advantages)}
    for batch in batches:
        assert batch.num_tokens <= tokens
        contexts = contexts_of(batch)
        used = set()
        for modality in ("image", "text"):
            rows = getattr(batch, modality)
            if rows is None:
                continue
            shift = int(image_shift and modality == "image")
            bounds = rows.cu_seqlens.tolist()
            assert len(rows.positions) == len(rows.targets) == len(rows.sampled_log_probs) == bounds[-1]
            for value, first, last in zip(rows.advantages.tolist(), bounds[:-1], bounds[1:], strict=True):
                row = row_of[value]
                seen[modality].append(row)
                targets, captured, prompt = expectations(rollout, modality, row, guided)
                assert rows.targets[first:last].tolist() == targets
                assert torch.equal(rows.sampled_log_probs[first:last], captured)
                branches = [(rows.positions, prompt)]
                if guided and modality == "image":
                    branches.append((rows.uncond_positions, policy.encoder.unconditional(len(prompt))))
                for positions, ids in branches:
                    for index, position in enumerate(positions[first:last].tolist()):
                        # What a token is predicted from: the prompt and the tokens before it.
                        context = contexts[position]
                        before = index + shift
                        assert batch.token_ids[context].tolist() == ids + targets[:before]
                        is_code = torch.isin(torch.tensor(context), batch.code_positions)
                        assert is_code.tolist() == [False] * len(ids) + [modality == "image"] * before
                        assert batch.position_ids[context].tolist() == list(range(len(context)))
                        used.update(context)
            assert (rows.uncond_positions is not None) == (guided and modality == "image")
            assert rows.old_log_probs is None and rows.ref_log_probs is None
        assert used == set(range(batch.num_tokens))  # nothing else is in the pack
        check_vision(batch, rollout, contexts, row_of)
    everyone = list(range(rollout.num_rows))
    assert sorted(seen["image"]) == ([] if modalities == "texts" else everyone)
    assert sorted(seen["text"]) == ([] if modalities == "images" else everyone)


def contexts_of(batch):
    """Per position, the positions that it may look at, in order, itself last."""
    bounds = batch.cu_seqlens.tolist()
    parents = [-1] * (len(bounds) - 1) if batch.prefixes is None else batch.prefixes.tolist()
    contexts = []
    for sequence, parent in enumerate(parents):
        before = list(range(bounds[parent], bounds[parent + 1])) if parent >= 0 else []
        assert parent < 0 or parents[parent] < 0
        for position in range(bounds[sequence], bounds[sequence + 1]):
            contexts.append(before + list(range(bounds[sequence], position + 1)))
    assert len(contexts) == batch.num_tokens
    return contexts


def expectations(rollout, modality, row, guided):
    """Targets, captured log-probs and prompt of one row."""
    prompt = row // rollout.group_size
    if modality == "image":
        captured = rollout.images.log_probs if guided else rollout.images.cond_log_probs
        return rollout.images.tokens[row].tolist(), captured[row], rollout.draw_ids[prompt]
    length = rollout.texts.lengths[row]
    return rollout.texts.tokens[row, :length].tolist(), rollout.texts.log_probs[row, :length], rollout.ask_ids[prompt]


def check_vision(batch, rollout, contexts, row_of):
    """Each answer looks at the features of its own prompt's image."""
    if batch.text is None:
        assert not len(batch.vision_positions)
        return
    placeholders = (batch.token_ids == rollout.image_token_id).index_fill(0, batch.code_positions, False)
    assert sorted(batch.vision_positions.tolist()) == placeholders.nonzero().flatten().tolist()
    assert torch.equal(batch.vision_features.view_as(rollout.vision_features), rollout.vision_features)
    feature_at = dict(zip(batch.vision_positions.tolist(), batch.vision_rows.tolist(), strict=True))
    firsts = batch.text.positions[batch.text.cu_seqlens[:-1].long()].tolist()
    for value, first in zip(batch.text.advantages.tolist(), firsts, strict=True):
        features = [feature_at[position] for position in contexts[first] if position in feature_at]
        start = row_of[value] // rollout.group_size * NUM_IMAGE_TOKENS
        assert features == list(range(start, start + NUM_IMAGE_TOKENS))


@pytest.mark.parametrize("guided", [False, True])
def test_a_shared_prompt_stands_in_a_pack_once(rollout_of, guided):
    rollout = rollout_of(5.0, 1.0)
    advantages = torch.zeros(rollout.num_rows)
    (own,) = pack_rollout(rollout, advantages, PackOptions(10_000, guided, share_prefix=False))
    (shared,) = pack_rollout(rollout, advantages, PackOptions(10_000, guided, share_prefix=True))
    drawn = sum(map(len, rollout.draw_ids)) * (2 if guided else 1)
    saved = (rollout.group_size - 1) * (drawn + sum(map(len, rollout.ask_ids)))
    assert shared.num_tokens == own.num_tokens - saved
    assert own.prefixes is None and len(shared.prefixes) == len(shared.cu_seqlens) - 1
    assert len(shared.vision_positions) == len(rollout.prompts) * NUM_IMAGE_TOKENS


def test_a_pack_of_one_sequence_each(rollout_of):
    rollout = rollout_of(5.0, 1.0)
    count = 2 * rollout.num_rows
    batches = pack_rollout(rollout, torch.zeros(rollout.num_rows), PackOptions(10_000), min_micro_batches=count)
    assert len(batches) == count
    assert all((batch.image is None) != (batch.text is None) for batch in batches)


def test_a_twin_stays_with_its_drawing(rollout_of):
    # The two halves of a drawing need each other's hidden states, so they count as one when packs are filled.
    rollout = copy.copy(rollout_of(5.0, 1.0))
    rollout.texts = None
    longest = max(map(len, rollout.draw_ids)) + NUM_IMAGE_TOKENS - 1
    advantages = torch.zeros(rollout.num_rows)
    assert pack_rollout(rollout, advantages, PackOptions(longest))
    with pytest.raises(UserError, match=f"packing.tokens is {longest}, but one sequence has {2 * longest} tokens"):
        pack_rollout(rollout, advantages, PackOptions(longest, guided=True))
    assert pack_rollout(rollout, advantages, PackOptions(2 * longest, guided=True))


def test_smaller_packs_repeat_a_prompt_only_where_a_group_is_cut(rollout_of):
    rollout = rollout_of(5.0, 1.0)
    advantages = torch.zeros(rollout.num_rows)
    (whole,) = pack_rollout(rollout, advantages, PackOptions(10_000))
    batches = pack_rollout(rollout, advantages, PackOptions(whole.num_tokens // 3))
    longest = max(map(len, [*rollout.draw_ids, *rollout.ask_ids]))
    assert sum(batch.num_tokens for batch in batches) <= whole.num_tokens + (len(batches) - 1) * longest
