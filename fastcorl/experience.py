"""What a step learns from: sampled groups, their scores and their advantages."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from fastcorl.algorithm import budget_lengths
from fastcorl.config import AlgorithmConfig
from fastcorl.data import PromptSource
from fastcorl.model import Policy
from fastcorl.records import ImageSamples, Prompt, Rollout, Scores, TextSamples
from fastcorl.rewards import RewardSuite, Scoring, to_pixels
from fastcorl.rollout import RolloutEngine, SamplingParams, interleave, join_groups, take_groups
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.step_metrics import group_ranges
from fastcorl.runtime.telemetry import PhaseTimer
from fastcorl_kernels import group_advantages


class Collector:
    """Samples and scores the groups of a step. `seed` identifies the run and the stage. With `overlap` drawings are
    scored beside what follows them."""

    def __init__(
        self,
        config: AlgorithmConfig,
        prompts: PromptSource,
        engine: RolloutEngine,
        rewards: RewardSuite,
        params: SamplingParams,
        group_size: int,
        seed: tuple,
        ranks: Distributed,
        timer: PhaseTimer,
        *,
        overlap: bool = False,
    ):
        self.config, self.prompts, self.engine, self.rewards = config, prompts, engine, rewards
        self.params, self.group_size, self.seed, self.ranks, self.timer = params, group_size, seed, ranks, timer
        self.overlap = overlap

    def collect(self, step: int, *, draw: bool, answer: bool) -> tuple[Rollout, Callable[[], Scores]]:
        """This rank's part of a step, and a call that waits for its scores.

        Groups whose rewards are all equal are replaced by other prompts' for as many rounds as `dynamic_sampling` says
        (DAPO, arXiv 2503.14476); what stays equal after them stays."""
        rank, world = self.ranks.rank, self.ranks.world_size
        prompts = self.prompts.take(step, rank, world)
        rollout, scoring = self._sample(prompts, (*self.seed, step), draw=draw, answer=answer)
        if self.overlap and not self.config.dynamic_sampling:
            return rollout, partial(self._finish, scoring)
        scores = self._finish(scoring)
        for number in range(1, self.config.dynamic_sampling + 1):
            flat = flat_groups(scores.total, rollout.group_size)
            if not flat.any():
                break
            others = self.prompts.reserve(step, number, int(flat.sum()), rank, world)
            more, scoring = self._sample(others, (*self.seed, step, "reserve", number), draw=draw, answer=answer)
            rollout, scores = most_telling(rollout, scores, more, self._finish(scoring))
        return rollout, lambda: scores

    def _sample(self, prompts: Sequence[Prompt], seed: tuple, *, draw: bool, answer: bool) -> tuple[Rollout, Scoring]:
        scoring = self.rewards.begin(overlap=self.overlap)
        early = self.overlap and not self.config.external  # rows of the data are scored with the others
        with self.timer.phase("rollout"):
            rollout = self.engine.generate(
                prompts,
                self.group_size,
                self.params,
                draw=draw,
                answer=answer,
                seed=seed,
                on_drawings=scoring.see_drawings if early else None,
            )
            if self.config.external:
                rollout = with_data_rows(rollout, self.engine.policy, self.params.max_new_tokens)
        with self.timer.phase("score"):
            scoring.start(rollout)
        return rollout, scoring

    def _finish(self, scoring: Scoring) -> Scores:
        with self.timer.phase("score"):
            scores = scoring.result()
        if self.overlap:
            self.timer.hide("score", scoring.hidden_seconds)
        return scores


def flat_groups(total: torch.Tensor, group_size: int) -> torch.Tensor:
    """(P,) bool: whose rewards tell nothing, being equal, or known of fewer than two rows."""
    low, high = group_ranges(total, total.isfinite(), group_size)
    return ~(high > low)


def most_telling(rollout: Rollout, scores: Scores, more: Rollout, more_scores: Scores) -> tuple[Rollout, Scores]:
    """As many groups as `rollout` has, from both: those that tell something first, each in the order they came."""
    size, count = rollout.group_size, len(rollout.prompts)
    total = torch.cat([scores.total, more_scores.total])
    order = flat_groups(total, size).to(torch.uint8).argsort(stable=True)[:count].sort().values
    rows = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    parts = {name: torch.cat([values, more_scores.parts[name]])[rows] for name, values in scores.parts.items()}
    failures = scores.failures | more_scores.failures
    joined = replace(scores, total=total[rows], parts=parts, failures=failures)
    return take_groups(join_groups([rollout, more]), order.tolist()), joined


def advantages_of(rollout: Rollout, scores: Scores, config: AlgorithmConfig, ranks: Distributed) -> torch.Tensor:
    """(n,) float32 advantages of this rank's rows. A collective call with advantage_mode normalize_then_sum."""
    if config.advantage_mode == "normalize_then_sum":
        # GDPO's last normalisation is over the whole batch, all ranks together.
        matrix = torch.stack([scores.parts[name] for name in scores.weights], dim=1)
        everyone = torch.cat(ranks.gather(matrix.cpu()))
        advantages = group_advantages(
            everyone,
            rollout.group_size,
            weights=list(scores.weights.values()),
            mode="normalize_then_sum",
            scale=config.advantage_scale,
        )
        start = ranks.rank * len(matrix)
        advantages = advantages[start : start + len(matrix)].to(matrix.device)
    else:
        advantages = group_advantages(scores.total, rollout.group_size, scale=config.advantage_scale)
    if config.pair_similarity:
        similarity = torch.tensor([prompt.pair_similarity for prompt in rollout.prompts], device=advantages.device)
        advantages = advantages * similarity.repeat_interleave(rollout.group_size)
    return advantages


def within_budget(rollout: Rollout, budget: int | None, seed: int) -> Rollout:
    """The rollout with its answers cut to what is trained on, at most `budget` tokens; see `budget_lengths`."""
    if budget is None or rollout.texts is None:
        return rollout
    lengths = budget_lengths(rollout.texts.lengths, budget, seed)
    return replace(rollout, texts=replace(rollout.texts, lengths=lengths))


def with_data_rows(rollout: Rollout, policy: Policy, max_new_tokens: int) -> Rollout:
    """Each group with one row more, which comes from the data: the real image's codes and the solution."""
    prompts, images, texts = rollout.prompts, None, None
    if rollout.images is not None:
        real = to_pixels([prompt.image for prompt in prompts], rollout.images.pixels.shape[-2:])
        codes = policy.encode_images(real)
        unknown = torch.full(codes.shape, torch.nan, device=codes.device)
        images = ImageSamples(codes, unknown, unknown, policy.decode_images(codes))
    if rollout.texts is not None:
        texts = _solutions(prompts, policy, max_new_tokens)
    data = replace(rollout, group_size=1, images=images, texts=texts)
    return replace(interleave(rollout, data), num_external=1)


def _solutions(prompts: Sequence[Prompt], policy: Policy, max_new_tokens: int) -> TextSamples:
    encoder = policy.encoder
    ids = [
        [*encoder.tokenizer(prompt.solution, add_special_tokens=False)["input_ids"], encoder.eos_id]
        for prompt in prompts
    ]
    answers = [torch.tensor(each[:max_new_tokens], device=policy.device) for each in ids]
    lengths = torch.tensor([len(answer) for answer in answers], device=policy.device)
    tokens = pad_sequence(answers, batch_first=True)
    unknown = torch.full(tokens.shape, torch.nan, device=policy.device)
    return TextSamples(
        tokens=tokens,
        lengths=lengths,
        log_probs=unknown.masked_fill(torch.arange(tokens.shape[1], device=policy.device) >= lengths[:, None], 0.0),
        answers=[prompt.solution for prompt in prompts],
        finished=torch.tensor([len(each) <= max_new_tokens for each in ids], device=policy.device),
    )
