"""The cosine between the two tasks' gradients is that of gradients taken one after the other."""

import pytest
import torch

from fastcorl.algorithm import CoRLObjective, PackOptions, StepTotals, pack_rollout
from fastcorl.algorithm.gradients import gradient_cosine
from tests.helpers import objective_options


@pytest.mark.parametrize("tokens", [10_000, 200])
def test_cosine_and_norms(policy, rollout_of, tokens):
    rollout = rollout_of(1.0)
    advantages = torch.randn(rollout.num_rows, generator=torch.Generator().manual_seed(0))
    rows = float(rollout.num_rows)
    totals = StepTotals({"image": rows, "text": rows}, {"image": 1.0, "text": 1.0})
    objective = CoRLObjective(policy, objective_options())
    batches = pack_rollout(rollout, advantages, PackOptions(tokens))
    found = gradient_cosine(objective, batches, totals, lambda tensor: tensor)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    assert all(weight.grad is None for weight in weights)
    flat = {}
    for modality in ("image", "text"):
        # That modality alone, in one pack.
        part = pack_rollout(rollout, advantages, PackOptions(10_000))[0]
        loss = objective(part, totals)[1][modality].loss
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        zeros = [torch.zeros_like(weight) for weight in weights]
        flat[modality] = torch.cat([(z if g is None else g).flatten() for g, z in zip(gradients, zeros, strict=True)])
    expected = torch.nn.functional.cosine_similarity(flat["image"].double(), flat["text"].double(), dim=0)
    assert found["gradient_cosine"] == pytest.approx(float(expected), abs=1e-4)
    assert found["text_gradient_norm"] == pytest.approx(float(flat["text"].norm()), rel=1e-4)
    assert found["image_gradient_norm"] == pytest.approx(float(flat["image"].norm()), rel=1e-4)


def test_no_cosine_without_a_gradient(policy, rollout_of):
    rollout = rollout_of(1.0)
    totals = StepTotals({"image": 1.0, "text": 1.0}, {"image": 1.0, "text": 1.0})
    batches = pack_rollout(rollout, torch.zeros(rollout.num_rows), PackOptions(10_000))
    found = gradient_cosine(CoRLObjective(policy, objective_options()), batches, totals, lambda tensor: tensor)
    assert found["gradient_cosine"] != found["gradient_cosine"]
