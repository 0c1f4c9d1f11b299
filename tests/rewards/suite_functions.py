"""Rewards as a user writes them."""


def half(rollout):
    return [0.5] * rollout.num_rows


def first_unscored(rollout):
    return [None] + [1.0] * (rollout.num_rows - 1)


def broken(rollout):
    return 1 / 0


def longer_wins(rollout, pairs):
    lengths = [len(answer) for answer in rollout.texts.answers]
    return [float(lengths[first] > lengths[second]) for first, second in pairs]


def of_drawings(rollout):
    return NotImplemented if rollout.images is None else [0.25] * rollout.num_rows
