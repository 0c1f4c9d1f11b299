import threading
from dataclasses import replace

import pytest
import torch

from fastcorl.config import RewardsConfig
from fastcorl.errors import UserError
from fastcorl.records import Prompt
from fastcorl.rewards import RewardModels, RewardSuite, TIMReward, match_score

ANSWERS = [
    "<think>one</think><answer>1</answer>",
    "<answer>one</answer>",
    "<think>x</think><answer>A</answer>",
    "garbage",
]
ACCURACY, FORMAT = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])


FUNCTIONS = "tests.rewards.suite_functions"


@pytest.fixture
def make_suite(policy):
    """Suites by their configuration; what they load is closed at the end."""
    opened = []

    def make(**settings):
        config = RewardsConfig(**settings)
        opened.append(RewardModels(config))
        return RewardSuite(config, opened[-1], policy, policy)

    yield make
    for models in opened:
        models.close()


def test_unified_total(make_suite, make_rollout, policy):
    rollout = make_rollout(ANSWERS)
    scores = make_suite(answer_weight=0.8)(rollout)
    parts = scores.parts
    assert set(parts) == {"cycle", "perceptual", "caption", "tim", "accuracy", "format"}
    assert torch.equal(parts["accuracy"], ACCURACY)
    assert torch.equal(parts["format"], FORMAT)
    assert torch.equal(parts["tim"], (TIMReward(policy)(rollout) + 1) / 2)
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
    config = RewardsConfig(answer_weight=0.3, captioner="/nowhere")
    suite = RewardSuite(config, RewardModels(config, draws=False), policy, policy)
    scores = suite(make_rollout(ANSWERS, images=False))
    assert set(scores.parts) == {"accuracy", "format"}
    assert torch.equal(scores.total, ACCURACY + FORMAT)
    assert scores.weights == {"accuracy": 1.0, "format": 1.0}


def test_what_is_not_there_is_told_before_anything_is_scored():
    with pytest.raises(UserError, match="rewards.captioner"):
        RewardModels(RewardsConfig(captioner="/nowhere"))


def test_weights_by_reward_and_the_weight_of_answers(make_suite, make_rollout):
    weights = {"cycle": 0.5, "caption": 0.25, "tim": 0.0, "accuracy": 2.0, "format": 0.5}
    scores = make_suite(weights=weights, answer_weight=0.8)(make_rollout(ANSWERS))
    parts = scores.parts
    assert set(parts) == {"cycle", "perceptual", "caption", "accuracy", "format"}
    expected = 0.5 * parts["cycle"] + 0.25 * parts["caption"] + 1.6 * parts["accuracy"] + 0.4 * parts["format"]
    torch.testing.assert_close(scores.total, expected)
    assert scores.weights == pytest.approx({"cycle": 0.5, "caption": 0.25, "accuracy": 1.6, "format": 0.4})


def test_raw_rewards_keep_their_ranges(make_suite, make_rollout, policy):
    rollout = make_rollout()
    unit, raw = make_suite()(rollout), make_suite(scaling="none")(rollout)
    torch.testing.assert_close(raw.parts["tim"], 2 * unit.parts["tim"] - 1)
    torch.testing.assert_close(raw.parts["cycle"], 2 * unit.parts["cycle"])
    mixed = make_suite(scaling="none", scaling_of={"tim": "unit"})(rollout)
    assert torch.equal(mixed.parts["tim"], unit.parts["tim"])
    assert torch.equal(mixed.parts["cycle"], raw.parts["cycle"])
    captions = [rollout.prompt_of(row).caption for row in range(4)]
    assert torch.equal(raw.parts["tim"], match_score(*policy.match_states(rollout.images.pixels, captions)))


@pytest.mark.parametrize("kind", ["ssim", "psnr", "mse", "rmse"])
def test_pixel_similarities_are_the_image_half(make_suite, make_rollout, kind):
    scores = make_suite(image_similarity=kind)(make_rollout())
    perceptual = scores.parts["perceptual"]
    assert ((perceptual >= 0) & (perceptual <= 1)).all() and perceptual.std() > 0


@pytest.mark.parametrize("names", [["jaccard"], ["spice_py"], ["soft_jaccard", "jaccard", "tuples"]])
def test_caption_similarities_are_the_text_half(make_suite, make_rollout, names):
    rollout = make_rollout()
    scores = make_suite(caption_similarity=names)(rollout)
    single = [make_suite(caption_similarity=[name])(rollout).parts["caption"] for name in names]
    torch.testing.assert_close(scores.parts["caption"], torch.stack(single).mean(0), equal_nan=True)


def test_nothing_to_score_is_a_value_error(make_suite, make_rollout):
    with pytest.raises(ValueError, match="without images and texts"):
        make_suite()(make_rollout(images=False))


def test_extras_are_weighted_and_none_is_nan(make_suite, make_rollout):
    scores = make_suite(extra={f"{FUNCTIONS}:half": 2.0, f"{FUNCTIONS}:first_unscored": -1.0})(
        make_rollout(ANSWERS, images=False)
    )
    nan = float("nan")
    torch.testing.assert_close(scores.parts[f"{FUNCTIONS}:half"], torch.full((4,), 0.5))
    unscored = torch.tensor([nan, 1.0, 1.0, 1.0])
    torch.testing.assert_close(scores.parts[f"{FUNCTIONS}:first_unscored"], unscored, equal_nan=True)
    torch.testing.assert_close(scores.total, ACCURACY + FORMAT + 1.0 - unscored, equal_nan=True)
    assert not scores.failures


def test_an_extra_that_fails_voids_its_rows_and_is_told(make_suite, make_rollout):
    scores = make_suite(extra={f"{FUNCTIONS}:broken": 1.0})(make_rollout(ANSWERS, images=False))
    assert scores.total.isnan().all()
    assert "ZeroDivisionError" in scores.failures[f"{FUNCTIONS}:broken"]


def test_an_extra_that_does_not_apply_is_left_out(make_suite, make_rollout):
    suite = make_suite(extra={f"{FUNCTIONS}:of_drawings": 2.0})
    texts = suite(make_rollout(ANSWERS, images=False))
    assert set(texts.parts) == {"accuracy", "format"} and torch.equal(texts.total, ACCURACY + FORMAT)
    both = suite(make_rollout(ANSWERS))
    assert both.parts[f"{FUNCTIONS}:of_drawings"].tolist() == [0.25] * 4


def test_an_extra_of_weight_0_is_only_logged(make_suite, make_rollout):
    scores = make_suite(extra={f"{FUNCTIONS}:broken": 0.0})(make_rollout(ANSWERS, images=False))
    assert scores.parts[f"{FUNCTIONS}:broken"].isnan().all()
    assert torch.equal(scores.total, ACCURACY + FORMAT)


def test_a_judge_of_pairs_is_a_reward(make_suite, make_rollout):
    scores = make_suite(pairwise={f"{FUNCTIONS}:longer_wins": 1.0})(make_rollout(ANSWERS, images=False))
    assert scores.parts[f"{FUNCTIONS}:longer_wins"].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("config", [{"extra": {f"{FUNCTIONS}:none": 1.0}}, {"caption_tuples": f"{FUNCTIONS}:none"}])
def test_bad_names_fail_when_the_models_are_loaded(config):
    with pytest.raises(UserError, match="has no 'none'"):
        RewardModels(RewardsConfig(**config))


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


# Overlap


def assert_same_scores(ours, theirs):
    assert list(ours.parts) == list(theirs.parts) and ours.weights == theirs.weights
    for name, values in theirs.parts.items():
        assert torch.equal(ours.parts[name].nan_to_num(9), values.nan_to_num(9)), name
    assert torch.equal(ours.total.nan_to_num(9), theirs.total.nan_to_num(9))
    assert not ours.total.requires_grad and not ours.total.is_inference()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("answers", [ANSWERS, None])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": {"cycle": 0.0, "perceptual": 1.0, "caption": 0.5}, "image_similarity": "ssim", "scaling": "none"},
        {"extra": {f"{FUNCTIONS}:of_drawings": 2.0}},
    ],
)
def test_scores_are_the_same_with_overlap(make_suite, make_rollout, settings, answers, early):
    suite, rollout = make_suite(**settings), make_rollout(answers)
    rollout.images.pixels[1] = torch.nan
    for _ in range(2):
        scoring = suite.begin(overlap=True)
        if early:
            scoring.see_drawings(replace(rollout, texts=None))
        scoring.start(rollout)
        assert_same_scores(scoring.result(), suite(rollout))
        assert scoring.hidden_seconds >= 0


def test_overlap_without_drawings(make_suite, make_rollout):
    suite, rollout = make_suite(), make_rollout(ANSWERS, images=False)
    scoring = suite.begin(overlap=True)
    scoring.start(rollout)
    assert_same_scores(scoring.result(), suite(rollout))
    assert scoring.hidden_seconds == 0


@pytest.mark.parametrize("captioner", ["quickstart", "policy"])
def test_what_needs_the_policy_stays_with_the_caller(policy, make_rollout, captioner):
    threads = {}

    def record(name):
        def reward(rollout):
            threads[name] = threading.current_thread()
            return torch.zeros(4)

        return reward

    config = RewardsConfig(captioner=captioner)
    models = RewardModels(config)
    suite = RewardSuite(config, models, policy, policy, captioner=lambda pixels: [""] * 4)
    suite.drawing_rewards = {name: record(name) for name in suite.drawing_rewards}
    scoring = suite.begin(overlap=True)
    scoring.see_drawings(make_rollout())
    scoring.start(make_rollout())
    scoring.result()
    models.close()
    here = {name for name, thread in threads.items() if thread is threading.main_thread()}
    assert set(threads) == {"perceptual", "caption", "tim"}
    assert here == ({"tim", "caption"} if captioner == "policy" else {"tim"})


def test_a_failure_beside_the_caller_is_told_as_ever(make_suite, make_rollout):
    suite, rollout = make_suite(), make_rollout()

    def fail(rollout):
        raise UserError("rewards.image_similarity: too small")

    suite.drawing_rewards["perceptual"] = fail
    scoring = suite.begin(overlap=True)
    scoring.see_drawings(rollout)
    scoring.start(rollout)
    with pytest.raises(UserError, match="^rewards.image_similarity: too small$"):
        scoring.result()


def test_closing_the_models_ends_what_is_computed(make_suite, make_rollout):
    """As after a failure or Ctrl-C while answers are sampled."""
    suite, rollout, computed = make_suite(), make_rollout(), []
    begun, go = threading.Event(), threading.Event()

    def perceptual(rollout):
        begun.set()
        go.wait(10)
        return torch.zeros(4)

    suite.drawing_rewards |= {"perceptual": perceptual, "caption": computed.append}
    suite.begin(overlap=True).see_drawings(rollout)
    begun.wait(10)
    threading.Timer(0.05, go.set).start()
    suite.models.close()
    assert not computed and "rewards" not in [thread.name for thread in threading.enumerate()]
