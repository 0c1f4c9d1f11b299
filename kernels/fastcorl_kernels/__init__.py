"""GRPO kernels that need torch only: flat token rows in, differentiable losses out.

Every function takes ``backend=None | "torch" | "triton"``. The sub-packages are named unlike the functions they hold,
so that ``fastcorl_kernels.grpo_loss`` is always the function.
"""

from fastcorl_kernels.advantages import group_advantages
from fastcorl_kernels.grpo import GRPOLoss, grpo_loss
from fastcorl_kernels.linear_grpo import linear_grpo_loss
from fastcorl_kernels.linear_log_softmax import linear_selective_log_softmax
from fastcorl_kernels.log_softmax import selective_log_softmax

__all__ = [
    "GRPOLoss",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "selective_log_softmax",
]
