"""fastcorl_kernels, by its default backend."""

import fastcorl_kernels
from bench.peers.contestant import Contestant
from bench.peers.settings import BETA, EPS, LOSS_TYPE


def _loss_arguments(rows):
    return dict(
        token_ids=rows.token_ids,
        advantages=rows.advantages,
        cu_seqlens=rows.cu_seqlens,
        old_log_probs=rows.old_log_probs,
        ref_log_probs=rows.ref_log_probs,
        mask=rows.mask,
        beta=BETA,
        eps_low=EPS,
        eps_high=EPS,
        loss_type=LOSS_TYPE,
    )


def selective_log_softmax(problem):
    index = problem.rows.token_ids
    return Contestant(lambda logits: fastcorl_kernels.selective_log_softmax(logits, index), problem.leaves)


def linear_selective_log_softmax(problem):
    def log_probs(hidden, weight):
        return fastcorl_kernels.linear_selective_log_softmax(hidden, weight, problem.rows.token_ids)

    return Contestant(log_probs, problem.leaves)


def grpo_loss(problem):
    arguments = _loss_arguments(problem.rows)
    return Contestant(lambda logits: fastcorl_kernels.grpo_loss(logits, **arguments).loss, problem.leaves)


def linear_grpo_loss(problem):
    arguments = _loss_arguments(problem.rows)

    def loss(hidden, weight):
        return fastcorl_kernels.linear_grpo_loss(hidden, weight, **arguments).loss

    return Contestant(loss, problem.leaves)


def group_advantages(problem):
    def advantages(rewards):
        return fastcorl_kernels.group_advantages(rewards, problem.group_size)

    return Contestant(advantages, problem.leaves)
