"""Members of a group from the data: RL-PLUS's ratio, weight and freedom from clip and KL, in the packed objective."""

import dataclasses

import pytest
import torch

from fastcorl.algorithm import CoRLObjective, PackOptions, StepTotals, pack_rollout, packed_log_probs
from fastcorl.algorithm.external import exploration_advantages, mixture_log_probs
from fastcorl.algorithm.objective import head_inputs
from tests.helpers import NUM_CODES, objective_options


def test_the_mixture_is_the_papers():
    old = torch.tensor([0.9, 0.5, 1e-3, 1e-12], dtype=torch.float64)
    unknown = old / 2 + 1 / (2 * 400)
    ratio = 2 * old / (unknown + old)
    torch.testing.assert_close((old.log() - mixture_log_probs(old.log(), 400)).exp(), ratio)


def test_tokens_that_are_certain_count_nothing():
    log_probs = torch.tensor([0.0, 0.5, 0.25, 0.0]).log()
    log_probs[0] = 0.0  # probability 1
    weighted = exploration_advantages(torch.tensor([2.0, -1.0]), torch.tensor([0, 2, 4]), log_probs, 2.0)
    torch.testing.assert_close(weighted, torch.tensor([0.0, 2 * 0.25, -0.5625, -1.0]))
    flat = exploration_advantages(torch.tensor([2.0, -1.0]), torch.tensor([0, 2, 4]), log_probs, 0.0)
    torch.testing.assert_close(flat, torch.tensor([2.0, 2.0, -1.0, -1.0]))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "dr_grpo"])
@pytest.mark.parametrize("tokens", [10_000, 150])
def test_the_objective_is_the_formula(policy, rollout_of, loss_type, tokens):
    """The last row of each group of two comes from the data."""
    options = objective_options(
        loss_type=loss_type, eps_low=0.1, eps_high=0.1, beta=0.1, guidance=1.0, external_gamma=1.5
    )
    rollout = dataclasses.replace(rollout_of(1.0), num_external=1)
    advantages = torch.randn(rollout.num_rows, generator=torch.Generator().manual_seed(1))
    batches = pack_rollout(rollout, advantages, PackOptions(tokens))
    words = float(rollout.texts.lengths.sum())
    rows = float(rollout.num_rows)
    totals = StepTotals({"image": rows, "text": rows}, {"image": float(rollout.images.tokens.numel()), "text": words})
    expected, loss = 0.0, 0.0
    for batch in batches:
        for modality, log_probs in packed_log_probs(policy, batch, options).items():
            part = getattr(batch, modality)
            part.old_log_probs = log_probs + 0.3 * torch.sin(part.targets.float())
            part.old_log_probs.clamp_(max=-1e-3)
            part.ref_log_probs = log_probs + 0.2 * torch.cos(part.targets.float())
        loss = loss + CoRLObjective(policy, options)(batch, totals)[0]
        expected = expected + _formula(policy, batch, options, totals)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    weight = policy.janus.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight")
    ours, theirs = torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()))


def _formula(policy, batch, options, totals):
    total = 0.0
    for modality, rows, hidden, weight, bias in head_inputs(policy, policy.hidden_states(batch), batch, options):
        logits = torch.nn.functional.linear(hidden, weight, bias).double()
        log_probs = logits.log_softmax(-1).gather(1, rows.targets[:, None]).squeeze(1)
        old, ref = rows.old_log_probs.double(), rows.ref_log_probs.double()
        num_classes = logits.shape[1]
        if modality == "image":
            assert num_classes == NUM_CODES
        for sequence, external in enumerate(rows.external.tolist()):
            part = slice(*rows.cu_seqlens[sequence : sequence + 2].tolist())
            advantage = float(rows.advantages[sequence])
            if external:
                unknown = old[part].exp() / 2 + 1 / (2 * num_classes)
                ratio = 2 * log_probs[part].exp() / (unknown + old[part].exp())
                terms = -ratio * advantage * (1 - old[part].exp()) ** options.external_gamma
            else:
                ratio = (log_probs[part] - old[part]).exp()
                if options.loss_type == "cispo":
                    terms = -ratio.clamp(max=1 + options.eps_high).detach() * advantage * log_probs[part]
                else:
                    clipped = ratio.clamp(1 - options.eps_low, 1 + options.eps_high)
                    terms = -torch.minimum(ratio * advantage, clipped * advantage)
                gap = ref[part] - log_probs[part]
                terms = terms + options.beta * (gap.exp() - gap - 1)
            if options.loss_type == "grpo":
                total = total + terms.mean() / totals.sequences[modality]
            elif options.loss_type == "dr_grpo":
                total = total + terms.sum() / (totals.sequences[modality] * options.max_lengths[modality])
            else:
                total = total + terms.sum() / totals.tokens[modality]
    return total
