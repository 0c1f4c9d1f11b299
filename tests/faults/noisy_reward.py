"""A user's reward with noise that belongs to what it scores."""

from random import Random


def noisy(rollout):
    rows = ((rollout.prompt_of(row).id, row % rollout.group_size) for row in range(rollout.num_rows))
    return [Random(f"{prompt} {member}").random() for prompt, member in rows]
