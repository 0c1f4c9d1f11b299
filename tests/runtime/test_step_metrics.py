"""Figures of a step: counted by hand on a small rollout."""

import dataclasses

import pytest
import torch

from fastcorl.records import Scores
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.step_metrics import StepMetrics

ALONE = Distributed(0, 1, torch.device("cpu"))
NAN = float("nan")


def record_of(rollout, scores, advantages):
    metrics = StepMetrics(rollout, scores, advantages)
    metrics.add_update(0.5, 1.0, 1e-4)
    metrics.add_figures({"gradient_cosine": 0.25})
    return metrics.record("unified", 1, 2, {}, ALONE)


@pytest.fixture
def parts(rollout):
    rollout, _ = rollout(group_size=4)
    rows = rollout.num_rows
    values = torch.arange(rows, dtype=torch.float32)
    values[: rollout.group_size] = 3.0  # a flat first group
    values[rollout.group_size] = NAN
    return rollout, Scores(values, {"tim": values}, {"tim": 1.0}, {"mine": "broke"}), values


def test_every_reward_has_mean_range_and_counts(parts):
    rollout, scores, values = parts
    record = record_of(rollout, scores, torch.zeros(rollout.num_rows))
    known = values[values.isfinite()]
    assert record.rewards["tim"] == pytest.approx(float(known.mean()))
    assert record.metrics["tim/min"] == float(known.min()) and record.metrics["tim/max"] == float(known.max())
    assert record.metrics["tim/unscored"] == pytest.approx(1 / rollout.num_rows)
    assert record.metrics["tim/flat"] == pytest.approx(1 / len(rollout.prompts))
    assert record.metrics["failed_rewards"] == 1 and record.metrics["gradient_cosine"] == 0.25


def test_rows_of_the_data_are_not_counted_as_sampled(parts):
    rollout, scores, values = parts
    external = dataclasses.replace(rollout, num_external=1)
    record = record_of(external, scores, torch.zeros(rollout.num_rows))
    sampled = ~external.external_rows()
    known = values[sampled & values.isfinite()]
    assert record.rewards["tim"] == pytest.approx(float(known.mean()))
    assert record.images == int(sampled.sum())
    assert record.tokens == int(sampled.sum()) * rollout.images.tokens.shape[1] + int(
        rollout.texts.lengths[sampled].sum()
    )


def test_a_reward_that_no_row_has_is_nan(parts):
    rollout, scores, _ = parts
    nothing = torch.full((rollout.num_rows,), NAN)
    record = record_of(rollout, dataclasses.replace(scores, parts={"tim": nothing}), torch.zeros(rollout.num_rows))
    assert record.rewards["tim"] != record.rewards["tim"]
    assert record.metrics["tim/min"] != record.metrics["tim/min"] and record.metrics["tim/unscored"] == 1
