"""Rollouts cut into groups and put together again."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from fastcorl.records import ImageSamples, Rollout, TextSamples


def take_groups(rollout: Rollout, groups: Sequence[int]) -> Rollout:
    """The rollout of some of the prompts, in the order given."""
    size = rollout.group_size
    rows = [row for group in groups for row in range(group * size, (group + 1) * size)]

    def lists(values: list) -> list:
        return [values[group] for group in groups] if values else []

    features = rollout.vision_features
    return replace(
        rollout,
        prompts=lists(rollout.prompts),
        images=_rows(rollout.images, rows),
        texts=_rows(rollout.texts, rows),
        draw_ids=lists(rollout.draw_ids),
        uncond_ids=lists(rollout.uncond_ids),
        ask_ids=lists(rollout.ask_ids),
        vision_features=None if features is None else features[list(groups)],
    )


def join_groups(rollouts: Sequence[Rollout]) -> Rollout:
    """The groups of several rollouts of one group size and the same modalities, in order."""
    first = rollouts[0]
    features = [rollout.vision_features for rollout in rollouts]

    def lists(name: str) -> list:
        return [value for rollout in rollouts for value in getattr(rollout, name)]

    return replace(
        first,
        prompts=lists("prompts"),
        images=_join([rollout.images for rollout in rollouts]),
        texts=_join([rollout.texts for rollout in rollouts]),
        draw_ids=lists("draw_ids"),
        uncond_ids=lists("uncond_ids"),
        ask_ids=lists("ask_ids"),
        vision_features=None if features[0] is None else torch.cat(features),
    )


def interleave(first: Rollout, second: Rollout) -> Rollout:
    """Groups of the same prompts, each the rows of `first` and then those of `second`."""
    size = first.group_size + second.group_size
    rows = []
    for group in range(len(first.prompts)):
        rows += range(group * first.group_size, (group + 1) * first.group_size)
        start = first.num_rows + group * second.group_size
        rows += range(start, start + second.group_size)
    return replace(
        first,
        group_size=size,
        images=_rows(_join([first.images, second.images]), rows),
        texts=_rows(_join([first.texts, second.texts]), rows),
    )


def _rows(samples: ImageSamples | TextSamples | None, rows: list[int]) -> ImageSamples | TextSamples | None:
    if samples is None:
        return None
    values = {field.name: getattr(samples, field.name) for field in fields(samples)}
    return type(samples)(
        **{
            name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
            for name, value in values.items()
        }
    )


def _join(parts: Sequence[ImageSamples | TextSamples | None]) -> ImageSamples | TextSamples | None:
    if parts[0] is None:
        return None
    joined = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], list):
            joined[field.name] = sum(values, [])
        elif values[0].dim() == 2:  # tokens and log-probs, of different lengths where they are answers
            rows = pad_sequence([row for value in values for row in value], batch_first=True)
            joined[field.name] = rows
        else:
            joined[field.name] = torch.cat(values)
    return type(parts[0])(**joined)
