"""Held-out scores of both abilities: drawings by an independent scorer, answers by exact match of the tagged answer."""

from collections.abc import Callable, Sequence

import torch

from fastcorl.records import Prompt, Rollout
from fastcorl.rewards import AccuracyReward, FormatReward, RewardSuite
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.runtime.distributed import Distributed

PROMPTS_AT_ONCE = 64

DrawingScorer = Callable[[list[str], torch.Tensor], dict[str, float]]


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

    Scores: the scorer's own; `accuracy` over all answers, `mc` and `oe` by question type, `format`. The prompts are
    shared out among the ranks; the same dictionary is returned on every rank.
    """
    mine = prompts[ranks.rank :: ranks.world_size]
    parts = [mine[start : start + PROMPTS_AT_ONCE] for start in range(0, len(mine), PROMPTS_AT_ONCE)]
    rollouts = [engine.generate(part, 1, params, draw=scorer is not None, seed=seed) for part in parts]
    results = ranks.gather([_compact(rollout, scorer is not None) for rollout in rollouts])
    captions, pixels, answers = [], [], []
    for rank_results in results:
        for part_captions, part_pixels, part_answers in rank_results:
            captions += part_captions
            pixels.append(part_pixels)
            answers += part_answers
    scores = scorer(captions, torch.cat(pixels).float() / 255) if scorer is not None else {}
    return scores | _answer_scores(answers)


def drawing_reward(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    rewards: RewardSuite,
    *,
    ranks: Distributed,
    seed: object = "evaluation",
) -> float:
    """Mean reward of one drawing per prompt, over all ranks; drawings without a reward are left out."""
    mine = prompts[ranks.rank :: ranks.world_size]
    parts = [mine[start : start + PROMPTS_AT_ONCE] for start in range(0, len(mine), PROMPTS_AT_ONCE)]
    totals = [rewards(engine.generate(part, 1, params, answer=False, seed=seed)).total for part in parts]
    known = [value for total in totals for value in total[total.isfinite()].tolist()]
    total, count = ranks.reduce([sum(known), float(len(known))])
    return total / count if count else 0.0


def _compact(rollout: Rollout, drawn: bool) -> tuple[list[str], torch.Tensor | None, list[tuple[str, float, float]]]:
    """What the scores need of a rollout, small enough to gather over ranks."""
    pixels = (rollout.images.pixels * 255).round().byte().cpu() if drawn else None
    types = [prompt.question_type for prompt in rollout.prompts]
    correct, tagged = AccuracyReward()(rollout).tolist(), FormatReward()(rollout).tolist()
    return [prompt.caption for prompt in rollout.prompts], pixels, list(zip(types, correct, tagged, strict=True))


def _answer_scores(answers: list[tuple[str, float, float]]) -> dict[str, float]:
    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    scores = {
        "accuracy": mean([correct for _, correct, _ in answers]),
        "mc": mean([correct for kind, correct, _ in answers if kind == "MC"]),
        "oe": mean([correct for kind, correct, _ in answers if kind == "OE"]),
        "format": mean([tagged for _, _, tagged in answers]),
    }
    return {name: value for name, value in scores.items() if value is not None}
