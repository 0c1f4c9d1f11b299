"""What a step trains on, one sampled sequence at a time, and how sequences go from one rank to another."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fastcorl.algorithm.assignment import Cost
from fastcorl.records import Rollout


@dataclass
class SampledSequence:
    """Prompt and completion ids of one drawing or answer.

    `row` is its row in the rollout, `prompt_index` its prompt in the features.
    """

    row: int
    is_image: bool
    prompt_index: int
    prompt: list[int]
    completion: list[int]
    inputs: list[int]  # completion tokens that are fed; the last one predicts nothing
    log_probs: torch.Tensor  # (completion,) float32, captured while sampling
    uncond_prompt: list[int] | None = None
    external: bool = False  # from the data

    @property
    def kind(self) -> str:
        return "draw" if self.is_image else "ask"

    def cost(self, *, share_prefix: bool) -> Cost:
        copies = 2 if self.uncond_prompt else 1
        prefix = (self.kind, self.prompt_index if share_prefix else self.row)
        return Cost(prefix, copies * len(self.prompt), copies * len(self.inputs))


def sampled_sequences(rollout: Rollout, *, guided: bool, image_shift: bool) -> list[SampledSequence]:
    """All sequences of a rollout, prompt by prompt: drawings, then answers. An answer without tokens is none."""
    sequences = []
    external = rollout.external_rows().tolist()
    if rollout.images:
        # The captured log-probs of the distribution that is trained.
        log_probs = rollout.images.log_probs if guided else rollout.images.cond_log_probs
        for row, codes in enumerate(rollout.images.tokens.tolist()):
            prompt = row // rollout.group_size
            sequences.append(
                SampledSequence(
                    row,
                    True,
                    prompt,
                    rollout.draw_ids[prompt],
                    codes,
                    codes if image_shift else codes[:-1],
                    log_probs[row],
                    rollout.uncond_ids[prompt] if guided else None,
                    external[row],
                )
            )
    if rollout.texts:
        lengths = rollout.texts.lengths.tolist()
        for row, tokens in enumerate(rollout.texts.tokens.tolist()):
            answer, prompt = tokens[: lengths[row]], row // rollout.group_size
            if answer:
                sequences.append(
                    SampledSequence(
                        row,
                        False,
                        prompt,
                        rollout.ask_ids[prompt],
                        answer,
                        answer[:-1],
                        rollout.texts.log_probs[row, : len(answer)],
                        external=external[row],
                    )
                )
    return sorted(sequences, key=lambda sequence: sequence.prompt_index)


class Ranks(Protocol):
    @property
    def rank(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        ...


def exchange(
    sequences: list[SampledSequence],
    rollout: Rollout,
    owned: list[range],
    wanted: list[range],
    ranks: Ranks,
) -> tuple[list[SampledSequence], torch.Tensor | None]:
    """Sends sequences to the ranks that want them; a collective call.

    Args:
        sequences: of this rank's `rollout`, of whose prompts they take the vision features along.
        owned: by rank, which places its sequences have in the line of all ranks' sequences.
        wanted: by rank, which places it is to have.

    Returns:
        This rank's sequences from now on, and (P, T_vision, hidden) features with those that came along behind its own.
    """
    features = rollout.vision_features
    mine = wanted[ranks.rank]
    at = dict(zip(owned[ranks.rank], sequences, strict=True))
    leaving = {place: sequence for place, sequence in at.items() if place not in mine}
    their_prompts = {sequence.prompt_index for sequence in leaving.values()}
    # Copies: a part of a tensor is sent with all of it.
    sent = (
        {place: replace(each, log_probs=each.log_probs.to("cpu", copy=True)) for place, each in leaving.items()},
        {} if features is None else {prompt: features[prompt].to("cpu", copy=True) for prompt in their_prompts},
    )
    index_of: dict[tuple[int, int], int] = {}
    arrived_features = []
    for rank, (moved, moved_features) in enumerate(ranks.gather(sent)):
        for place, sequence in moved.items():
            if place not in mine:
                continue
            origin = rank, sequence.prompt_index
            if origin not in index_of:
                index_of[origin] = len(rollout.prompts) + len(index_of)
                arrived_features += [moved_features[sequence.prompt_index]] if moved_features else []
            log_probs = sequence.log_probs.to(rollout.device)
            at[place] = replace(sequence, prompt_index=index_of[origin], log_probs=log_probs)
    if arrived_features:
        features = torch.cat([features, torch.stack(arrived_features).to(features)])
    return [at[place] for place in mine], features
