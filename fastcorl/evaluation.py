"""Held-out scores of both abilities: drawings by an independent scorer, answers by exact match of the tagged answer."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from fastcorl.errors import UserError
from fastcorl.plugins import load_object
from fastcorl.records import Prompt, Rollout
from fastcorl.rewards import AccuracyReward, FormatReward, RewardSuite
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.runtime.distributed import Distributed

PROMPTS_AT_ONCE = 64

DrawingScorer = Callable[[list[str], torch.Tensor], dict[str, float]]


def load_scorer(spec: str | None, key: str) -> DrawingScorer | None:
    """The judge of drawings that `spec`, a `module:class`, makes; `key` is the setting that errors point to."""
    if not spec:
        return None
    scorer = load_object(spec, key)()
    if not callable(scorer):
        raise UserError(f"{key} {spec}: makes a {type(scorer).__name__}, which cannot be called")
    return scorer


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    scorer: DrawingScorer | None,
    *,
    ranks: Distributed,
    seed: object = "evaluation",
) -> dict[str, float]:
    """One drawing and one answer per prompt, sampled as in training; every score is a fraction in [0, 1].

    Without `scorer` nothing is drawn; prompts without a question are not answered. Scores: the scorer's own; `accuracy`
    over all answers, `mc` and `oe` by question type, `format`, and `unfinished`, the answers cut at the limit. The
    prompts are shared out among the ranks; the same dictionary is returned on every rank.
    """
    captions, pixels, answers = [], [], []
    for part in _portions(prompts, ranks):
        for rollout in _rollouts(engine, part, params, seed, draw=scorer is not None):
            if rollout.images is not None:
                captions += [prompt.caption for prompt in rollout.prompts]
                pixels.append((rollout.images.pixels * 255).round().byte().cpu())
            if rollout.texts is not None:
                answers += _answers(rollout)
    gathered = ranks.gather((captions, torch.cat(pixels) if pixels else None, answers))
    scores = {}
    if scorer is not None:
        drawn = torch.cat([found for _, found, _ in gathered if found is not None])
        scores |= scorer([caption for found, _, _ in gathered for caption in found], drawn.float() / 255)
    return scores | _answer_scores([answer for _, _, found in gathered for answer in found])


def _portions(prompts: Sequence[Prompt], ranks: Distributed) -> Iterator[Sequence[Prompt]]:
    """This rank's prompts, as many at a time as are sampled together."""
    mine = prompts[ranks.rank :: ranks.world_size]
    for start in range(0, len(mine), PROMPTS_AT_ONCE):
        yield mine[start : start + PROMPTS_AT_ONCE]


def _rollouts(
    engine: RolloutEngine, prompts: Sequence[Prompt], params: SamplingParams, seed: object, *, draw: bool
) -> Iterator[Rollout]:
    """One call for all where each has a question, which is faster; else drawings and answers apart."""
    asked = [prompt for prompt in prompts if prompt.question_type and prompt.question and prompt.solution]
    if len(asked) == len(prompts) or (not asked and draw):
        yield engine.generate(prompts, 1, params, draw=draw, answer=bool(asked), seed=seed)
        return
    if draw:
        yield engine.generate(prompts, 1, params, answer=False, seed=seed)
    if asked:
        yield engine.generate(asked, 1, params, draw=False, seed=seed)


def drawing_reward(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    rewards: RewardSuite,
    *,
    ranks: Distributed,
    group_size: int = 2,
    seed: object = "evaluation",
) -> float | None:
    """Mean reward of drawings of the prompts with a caption, over all ranks; None where none has a reward. A group has
    at least two, so that judges of pairs have something to compare."""
    parts = _portions([prompt for prompt in prompts if prompt.caption], ranks)
    totals = [rewards(engine.generate(part, group_size, params, answer=False, seed=seed)).total for part in parts]
    known = [value for total in totals for value in total[total.isfinite()].tolist()]
    total, count = ranks.reduce([sum(known), float(len(known))])
    return total / count if count else None


class _Answer(NamedTuple):
    question_type: str
    correct: float
    tagged: float
    cut: float


def _answers(rollout: Rollout) -> list[_Answer]:
    types = [prompt.question_type for prompt in rollout.prompts]
    cut = (~rollout.texts.finished).float().tolist()
    scores = AccuracyReward()(rollout).tolist(), FormatReward()(rollout).tolist(), cut
    return [_Answer(*answer) for answer in zip(types, *scores, strict=True)]


def _answer_scores(answers: list[_Answer]) -> dict[str, float]:
    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    scores = {
        "accuracy": mean([answer.correct for answer in answers]),
        "mc": mean([answer.correct for answer in answers if answer.question_type == "MC"]),
        "oe": mean([answer.correct for answer in answers if answer.question_type == "OE"]),
        "format": mean([answer.tagged for answer in answers]),
        "unfinished": mean([answer.cut for answer in answers]),
    }
    return {name: value for name, value in scores.items() if value is not None}
