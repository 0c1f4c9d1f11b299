"""GRPO kernels that need torch only: flat token rows in, differentiable losses out; and the sampling before them.

Every function takes ``backend=None | "torch" | "triton"``. The sub-packages are named unlike the functions they hold,
so that ``fastcorl_kernels.grpo_loss`` is always the function.
"""

from fastcorl_kernels.advantages import group_advantages
from fastcorl_kernels.grpo import GRPOLoss, grpo_loss
from fastcorl_kernels.linear_grpo import linear_grpo_loss
from fastcorl_kernels.linear_log_softmax import linear_selective_log_softmax
from fastcorl_kernels.log_softmax import selective_log_softmax
from fastcorl_kernels.paged_attention import SharedPrefix, paged_decode_attention, rope_to_pages
from fastcorl_kernels.sampling import SampledTokens, gumbel_noise, sample_tokens

__all__ = [
    "GRPOLoss",
    "SampledTokens",
    "SharedPrefix",
    "group_advantages",
    "grpo_loss",
    "gumbel_noise",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "paged_decode_attention",
    "rope_to_pages",
    "sample_tokens",
    "selective_log_softmax",
]
