import sys
from types import ModuleType

import pytest
import torch

from fastcorl.config import RewardsConfig
from fastcorl.errors import UserError
from fastcorl.records import Prompt
from fastcorl.rewards import RewardSuite, TIMReward
from fastcorl.rewards import captioner as captioner_module

ANSWERS = [
    "<think>one</think><answer>1</answer>",
    "<answer>one</answer>",
    "<think>x</think><answer>A</answer>",
    "garbage",
]
ACCURACY, FORMAT = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])


@pytest.fixture
def plugin(monkeypatch):
    module = ModuleType("suite_plugin")
    monkeypatch.setitem(sys.modules, "suite_plugin", module)
    return module


@pytest.fixture
def make_suite(policy, captioner):
    return lambda **config: RewardSuite(RewardsConfig(**config), policy, policy, captioner=captioner)


def test_unified_total(make_suite, make_rollout, policy):
    rollout = make_rollout(ANSWERS)
    scores = make_suite(answer_weight=0.8)(rollout)
    parts = scores.parts
    assert set(parts) == {"cycle", "perceptual", "caption", "tim", "accuracy", "format"}
    assert torch.equal(parts["accuracy"], ACCURACY)
    assert torch.equal(parts["format"], FORMAT)
    assert torch.equal(parts["tim"], TIMReward(policy)(rollout))
    for row in range(4):
        part = {name: values[row].item() for name, values in parts.items()}
        expected = part["cycle"] + part["tim"] + 0.8 * (part["accuracy"] + part["format"])
        assert scores.total[row].item() == pytest.approx(expected, abs=1e-6)
        assert part["cycle"] == pytest.approx((part["perceptual"] + part["caption"]) / 2)
    for values in (scores.total, *parts.values()):
        assert values.shape == (4,)
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert not values.is_inference()


def test_drawings_alone(make_suite, make_rollout):
    scores = make_suite()(make_rollout())
    assert set(scores.parts) == {"cycle", "perceptual", "caption", "tim"}
    assert torch.equal(scores.total, scores.parts["cycle"] + scores.parts["tim"])


def test_texts_alone_are_unweighted_and_need_no_captioner(policy, make_rollout):
    suite = RewardSuite(RewardsConfig(answer_weight=0.3, captioner="/nowhere"), policy, policy)
    scores = suite(make_rollout(ANSWERS, images=False))
    assert set(scores.parts) == {"accuracy", "format"}
    assert torch.equal(scores.total, ACCURACY + FORMAT)


def test_a_missing_captioner_is_a_value_error_at_the_first_drawing(policy, make_rollout, monkeypatch, tmp_path):
    monkeypatch.setattr(captioner_module, "QUICKSTART_FOLDER", tmp_path / "gone")
    with pytest.raises(ValueError, match="no captioner at 'quickstart'"):
        RewardSuite(RewardsConfig(), policy, policy)(make_rollout())


def test_nothing_to_score_is_a_value_error(make_suite, make_rollout):
    with pytest.raises(ValueError, match="without images and texts"):
        make_suite()(make_rollout(images=False))


def test_extras_are_weighted_and_none_is_nan(make_suite, make_rollout, plugin):
    plugin.brevity = lambda rollout: [1, None, 0.5, float("inf")]
    plugin.tensor = lambda rollout: torch.arange(rollout.num_rows)
    extra = {"suite_plugin:brevity": 2.0, "suite_plugin:tensor": -1.0}
    rollout = make_rollout(ANSWERS, images=False)
    scores = make_suite(extra=extra)(rollout)
    nan = float("nan")
    brevity = torch.tensor([1.0, nan, 0.5, nan])
    torch.testing.assert_close(scores.parts["suite_plugin:brevity"], brevity, equal_nan=True)
    expected = ACCURACY + FORMAT + 2 * brevity - torch.arange(4)
    torch.testing.assert_close(scores.total, expected, equal_nan=True)


def test_an_extra_of_weight_0_is_only_logged(make_suite, make_rollout, plugin):
    plugin.nothing = lambda rollout: [None] * rollout.num_rows
    scores = make_suite(extra={"suite_plugin:nothing": 0.0})(make_rollout(ANSWERS, images=False))
    assert scores.parts["suite_plugin:nothing"].isnan().all()
    assert torch.equal(scores.total, ACCURACY + FORMAT)


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 5, torch.ones(4, 1)])
def test_an_extra_of_the_wrong_length_is_named(make_suite, make_rollout, plugin, values):
    plugin.short = lambda rollout: values
    with pytest.raises(ValueError, match=r"'suite_plugin:short' returned shape .* for 4 rows"):
        make_suite(extra={"suite_plugin:short": 1.0})(make_rollout(ANSWERS, images=False))


def test_an_error_in_an_extra_propagates(make_suite, make_rollout, plugin):
    plugin.broken = lambda rollout: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_suite(extra={"suite_plugin:broken": 1.0})(make_rollout(ANSWERS, images=False))


@pytest.mark.parametrize("config", [{"extra": {"suite_plugin:none": 1.0}}, {"caption_tuples": "suite_plugin:none"}])
def test_bad_names_fail_when_the_suite_is_built(make_suite, plugin, config):
    with pytest.raises(UserError, match="has no 'none'"):
        make_suite(**config)


def test_rows_that_cannot_be_scored_are_nan_alone(make_suite, make_rollout):
    rollout = make_rollout(ANSWERS)
    rollout.images.pixels[1] = torch.nan
    known, _ = rollout.prompts
    unsolved = Prompt("1", known.caption, known.image, "?", "no tags", "OE")
    rollout.prompts[1] = unsolved
    scores = make_suite()(rollout)
    assert scores.parts["perceptual"].isnan().tolist() == [False, True, False, False]
    assert scores.parts["accuracy"].isnan().tolist() == [False, False, True, True]
    assert scores.total.isnan().tolist() == [False, True, True, True]
