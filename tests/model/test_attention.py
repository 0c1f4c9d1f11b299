"""The packed backbone against transformers' own, one sequence at a time."""

import pytest
import torch

from fastcorl.algorithm import PackOptions, pack_rollout
from fastcorl.model import PackedAttention, pack_prompts
from fastcorl.rollout import RolloutEngine, SamplingParams
from tests.helpers import image_hidden, published_text_inputs, unconditional_ids

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40]


def random_ids(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(6, 300, (length,), generator=generator).tolist() for length in lengths]


def alone(reference, ids):
    return reference.model.language_model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("lengths", [[1], [9], LENGTHS, LENGTHS[::-1], [1, 1, 40, 1], [33] * 5], ids=str)
def test_a_pack_equals_its_sequences_one_by_one(policy, reference, lengths):
    sequences = random_ids(lengths)
    with torch.no_grad():
        packed = policy.hidden_states(pack_prompts(sequences, None, policy.encoder.image_id, policy.device))
        expected = torch.cat([alone(reference, ids) for ids in sequences])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("tokens", [110, 250, 10_000])
def test_a_pack_of_drawings_and_answers_equals_its_sequences_one_by_one(
    policy, reference, prompts, tokens, share_prefix
):
    rollout = RolloutEngine(policy).generate(prompts, 3, SamplingParams(1.0, 5.0, 9), seed=2)
    options = PackOptions(tokens, guided=True, share_prefix=share_prefix)
    batches = pack_rollout(rollout, torch.arange(float(rollout.num_rows)), options)
    assert (len(batches) > 1) == (tokens < 10_000)
    compared = 0
    with torch.no_grad():
        for batch in batches:
            hidden = policy.hidden_states(batch)
            for rows, alone in ((batch.image, drawn_alone), (batch.text, answered_alone)):
                if rows is None:
                    continue
                bounds = rows.cu_seqlens.tolist()
                for row, start, end in zip(rows.advantages.int().tolist(), bounds[:-1], bounds[1:], strict=True):
                    expected = alone(policy, reference, rollout, row, end - start)
                    branches = (
                        [rows.positions] if rows.uncond_positions is None else [rows.positions, rows.uncond_positions]
                    )
                    for positions, states in zip(branches, expected, strict=True):
                        torch.testing.assert_close(hidden[positions[start:end]], states, rtol=0, atol=1e-5)
                    compared += 1
    assert compared == 2 * rollout.num_rows


def drawn_alone(policy, reference, rollout, row, count):
    """States that the codes are drawn from, conditional and unconditional."""
    ids = torch.tensor(rollout.draw_ids[row // rollout.group_size])
    branches = (ids, unconditional_ids(policy, ids))
    return [image_hidden(reference, each, rollout.images.tokens[row])[-count - 1 : -1] for each in branches]


def answered_alone(policy, reference, rollout, row, count):
    inputs = published_text_inputs(policy, rollout.prompt_of(row))
    ids = torch.cat([inputs["input_ids"][0], rollout.texts.tokens[row, : count - 1]])
    return [reference.model(input_ids=ids[None], pixel_values=inputs["pixel_values"]).last_hidden_state[0, -count:]]


@pytest.mark.parametrize("lengths", [[1], [1, 1], [7, 1, 30], LENGTHS], ids=str)
def test_sequences_that_continue_others(policy, reference, lengths):
    """Prefixes of any length, each continued by several sequences of any length, some by none, in any order."""
    generator = torch.Generator().manual_seed(5)
    prefixes, continuations = random_ids(lengths), random_ids([9, 1, 2, 33, 16])
    parts = [(ids, -1) for ids in prefixes]
    parts += [(continuations[i % 5], i % len(lengths)) for i in range(11)]
    order = torch.randperm(len(parts), generator=generator).tolist()
    where = {old: new for new, old in enumerate(order)}
    parts = [parts[old] for old in order]
    parents = [where[parent] if parent >= 0 else -1 for _, parent in parts]
    batch = pack_prompts([ids for ids, _ in parts], None, policy.encoder.image_id, policy.device)
    batch.prefixes = torch.tensor(parents)
    bounds = batch.cu_seqlens.tolist()
    for sequence, parent in enumerate(parents):
        if parent >= 0:
            batch.position_ids[bounds[sequence] : bounds[sequence + 1]] += len(parts[parent][0])
    with torch.no_grad():
        hidden = policy.hidden_states(batch)
        for sequence, ((ids, _), parent) in enumerate(zip(parts, parents, strict=True)):
            before = parts[parent][0] if parent >= 0 else []
            expected = alone(reference, before + ids)[len(before) :]
            torch.testing.assert_close(hidden[bounds[sequence] : bounds[sequence + 1]], expected, rtol=0, atol=1e-5)


def test_gradients_of_a_pack_equal_those_of_its_sequences(policy, reference):
    sequences = random_ids(LENGTHS)
    weights = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(4))
    names = ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"]
    names += ["layers.1.self_attn.v_proj.weight", "layers.0.mlp.down_proj.weight", "norm.weight"]

    def gradients(backbone, hidden):
        parameters = [backbone.get_parameter(name) for name in names]
        return torch.autograd.grad((hidden * weights).sum(), parameters)

    packed = policy.hidden_states(pack_prompts(sequences, None, policy.encoder.image_id, policy.device))
    expected = torch.cat([alone(reference, ids) for ids in sequences])
    for name, ours, theirs in zip(
        names,
        gradients(policy.backbone, packed),
        gradients(reference.model.language_model, expected),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sequence_may_continue_a_part_of_another(policy, reference):
    chain, *tails = random_ids([12, 1, 3, 2, 5])
    seen = [1, 7, 12, 4]
    with torch.no_grad():
        ids = torch.tensor([*chain, *(token for tail in tails for token in tail)])
        positions = [*range(12)]
        for tail, length in zip(tails, seen, strict=True):
            positions += range(length, length + len(tail))
        bounds = torch.tensor([12, *map(len, tails)]).cumsum(0)
        attention = PackedAttention(
            torch.cat([torch.tensor([0]), bounds]),
            torch.tensor([-1, 0, 0, 0, 0]),
            prefix_lengths=torch.tensor([0, *seen]),
        )
        hidden = policy.run_backbone(policy.embed_text(ids)[None], torch.tensor([positions]), attention)[0]
        parts = hidden.split([12, *map(len, tails)])[1:]
        for part, tail, length in zip(parts, tails, seen, strict=True):
            expected = alone(reference, [*chain[:length], *tail])[length:]
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
