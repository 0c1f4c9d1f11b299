"""What a step learns from: resampled groups, advantages, rows of the data."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fastcorl.config import AlgorithmConfig
from fastcorl.experience import (
    Collector,
    advantages_of,
    flat_groups,
    most_telling,
    with_data_rows,
    within_budget,
)
from fastcorl.records import Scores
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.telemetry import PhaseTimer
from fastcorl_kernels import group_advantages

ALONE = Distributed(0, 1, torch.device("cpu"))
NAN = float("nan")


@pytest.fixture(scope="module")
def rollout(policy, prompts):
    return RolloutEngine(policy).generate(prompts, 2, SamplingParams(guidance=2.0, max_new_tokens=12), seed=1)


def scores_of(values, **parts):
    total = torch.tensor(values, dtype=torch.float32)
    return Scores(total, {name: torch.tensor(part, dtype=torch.float32) for name, part in parts.items()})


def test_flat_groups_tell_nothing():
    total = torch.tensor([1.0, 1, 0, 1, NAN, 1, NAN, NAN, 2, 3])
    assert flat_groups(total, 2).tolist() == [True, False, True, True, False]


def test_telling_groups_replace_flat_ones(policy, prompts, rollout):
    other = RolloutEngine(policy).generate(prompts[:3], 2, SamplingParams(guidance=2.0, max_new_tokens=12), seed=9)
    first = scores_of([0, 1, 1, 1, 0, 1, 2, 2, 3, 3], tim=range(10))
    second = scores_of([5, 5, 5, 6, 7, 8], tim=range(10, 16))
    joined, scores = most_telling(rollout, first, other, second)
    # Groups 0 and 2 tell something, 1 and 2 of the others; then the first flat one.
    assert scores.total.tolist() == [0, 1, 1, 1, 0, 1, 5, 6, 7, 8]
    assert scores.parts["tim"].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15]
    ids = ["prompt-0", "prompt-1", "prompt-2", "prompt-1", "prompt-2"]
    assert [prompt.id for prompt in joined.prompts] == ids
    assert torch.equal(joined.images.tokens[6:], other.images.tokens[2:])
    assert torch.equal(joined.images.tokens[:6], rollout.images.tokens[:6])


class Prompts:
    """Prompts 0 and 1 for the step, 2 to 4 in reserve."""

    def __init__(self, prompts):
        self.prompts = prompts
        self.asked = []

    def take(self, step, rank, world):
        return self.prompts[:2]

    def reserve(self, step, round, count, rank, world):
        self.asked.append((step, round, count))
        return self.prompts[1 + round : 1 + round + count]


class Rewards:
    """A suite of one reward; `seen` are the rollouts it has been told of, by the name of the call."""

    hidden_seconds = 0.5

    def __init__(self, judge):
        self.judge, self.seen = judge, []

    def begin(self, *, overlap):
        return self

    def see_drawings(self, rollout):
        self.seen.append(("see_drawings", rollout))

    def start(self, rollout):
        self.seen.append(("start", rollout))

    def result(self):
        return self.judge(self.seen[-1][1])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("rounds", "ids"), [(0, "01"), (1, "02"), (3, "02")])
def test_dynamic_sampling_asks_the_reserve(policy, prompts, rounds, ids, overlap):
    """Prompt 1 always gets equal rewards, every other prompt different ones."""

    def judge(rollout):
        rows = range(rollout.num_rows)
        values = [0.0 if rollout.prompt_of(row).id == "prompt-1" else float(row % 2) for row in rows]
        return scores_of(values, part=values)

    source = Prompts(prompts)
    collector = Collector(
        AlgorithmConfig(dynamic_sampling=rounds),
        source,
        RolloutEngine(policy),
        Rewards(judge),
        SamplingParams(max_new_tokens=4),
        2,
        ("test",),
        ALONE,
        PhaseTimer(),
        overlap=overlap,
    )
    rollout, finish_scores = collector.collect(7, draw=False, answer=True)
    scores = finish_scores()
    assert [prompt.id for prompt in rollout.prompts] == [f"prompt-{digit}" for digit in ids]
    assert source.asked == ([(7, 1, 1)] if rounds else [])
    assert flat_groups(scores.total, 2).any() == (rounds == 0)


@pytest.mark.parametrize(("external", "overlap"), [(False, True), (True, True), (False, False)])
def test_drawings_are_scored_as_soon_as_they_are_whole(policy, prompts, external, overlap):
    """Rows of the data join the drawings only after them, so then there is nothing to begin with."""
    rewards, timer = Rewards(lambda rollout: scores_of([0.0] * rollout.num_rows)), PhaseTimer()
    collector = Collector(
        AlgorithmConfig(external=external),
        Prompts(prompts),
        RolloutEngine(policy),
        rewards,
        SamplingParams(max_new_tokens=24),
        2,
        ("test",),
        ALONE,
        timer,
        overlap=overlap,
    )
    rollout, finish_scores = collector.collect(1, draw=True, answer=True)
    early = overlap and not external
    assert [name for name, _ in rewards.seen] == (["see_drawings", "start"] if early else ["start"])
    if early:
        drawings = rewards.seen[0][1]
        assert drawings.texts is None and torch.equal(drawings.images.pixels, rollout.images.pixels)
    assert rewards.seen[-1][1] is rollout
    assert len(finish_scores().total) == rollout.num_rows
    assert list(timer.take()) == ["rollout", "score"]
    assert timer.take_hidden() == ({"score_hidden_seconds": 0.5} if overlap else {})
    assert timer.take_hidden() == {}


def test_advantages_of_the_sum(rollout):
    scores = scores_of(torch.arange(10.0).sin().tolist())
    expected = group_advantages(scores.total, 2)
    assert torch.equal(advantages_of(rollout, scores, AlgorithmConfig(), ALONE), expected)


def test_each_reward_is_normalised_first_on_request(rollout):
    one, two = torch.arange(10.0).sin(), 100 * torch.arange(10.0).cos()
    scores = Scores(one + two, {"one": one, "two": two, "logged": one}, {"one": 2.0, "two": 0.5})
    config = AlgorithmConfig(advantage_mode="normalize_then_sum")
    expected = group_advantages(torch.stack([one, two], 1), 2, weights=[2.0, 0.5], mode="normalize_then_sum")
    assert torch.equal(advantages_of(rollout, scores, config, ALONE), expected)


def test_normalising_is_over_all_ranks(rollout):
    """Two ranks with the same rows as one rank with both."""
    values = torch.arange(20.0).sin()

    class Second(Distributed):
        def gather(self, value):
            return [values[:10, None], value]

    config = AlgorithmConfig(advantage_mode="normalize_then_sum")
    scores = Scores(values[10:], {"one": values[10:]}, {"one": 1.0})
    found = advantages_of(rollout, scores, config, Second(1, 2, torch.device("cpu")))
    assert torch.equal(found, group_advantages(values[:, None], 2, mode="normalize_then_sum")[10:])


def test_pairs_count_by_their_similarity(prompts, rollout):
    similar = [dataclasses.replace(prompt, pair_similarity=index / 4) for index, prompt in enumerate(prompts)]
    paired = dataclasses.replace(rollout, prompts=similar)
    scores = scores_of(torch.arange(10.0).sin().tolist())
    factors = torch.tensor([0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1])
    found = advantages_of(paired, scores, AlgorithmConfig(pair_similarity=True), ALONE)
    torch.testing.assert_close(found, group_advantages(scores.total, 2) * factors)


def test_a_row_of_the_data_joins_each_group(policy, prompts, rollout):
    joined = with_data_rows(rollout, policy, 12)
    assert joined.group_size == 3 and joined.num_external == 1
    assert joined.external_rows().tolist() == [False, False, True] * 5
    drawn = torch.arange(15)[~joined.external_rows()]
    assert torch.equal(joined.images.tokens[drawn], rollout.images.tokens)
    for group, prompt in enumerate(prompts):
        row = 3 * group + 2
        pixels = torch.from_numpy(np.array(prompt.image.resize((16, 16), Image.Resampling.BICUBIC)))
        codes = policy.encode_images(pixels[None].permute(0, 3, 1, 2) / 255)
        assert torch.equal(joined.images.tokens[row], codes[0])
        torch.testing.assert_close(joined.images.pixels[row], policy.decode_images(codes)[0])
        ids = policy.encoder.tokenizer(prompt.solution, add_special_tokens=False)["input_ids"]
        expected = [*ids, policy.encoder.eos_id][:12]
        length = int(joined.texts.lengths[row])
        assert joined.texts.tokens[row, :length].tolist() == expected
        assert bool(joined.texts.finished[row]) == (len(ids) < 12)
        assert joined.texts.answers[row] == prompt.solution
        assert joined.images.log_probs[row].isnan().all() and joined.texts.log_probs[row, :length].isnan().all()


def test_answers_are_cut_to_the_budget(rollout):
    assert within_budget(rollout, None, 0) is rollout
    budget = int(rollout.texts.lengths.sum()) // 3
    cut = within_budget(rollout, budget, 5)
    assert int(cut.texts.lengths.sum()) == budget
    assert cut.texts.tokens is rollout.texts.tokens and cut.images is rollout.images
