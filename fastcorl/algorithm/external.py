"""Members of a group that come from the data instead of the policy (RL-PLUS, Dong et al. 2025, arXiv 2508.00222).

Their ratio is not to the policy that sampled them, which is unknown, but to a mixture: r = 2 pi / (pi_omega + pi_old),
where pi_omega = pi_old / 2 + 1 / (2 V) stands for the unknown one. Their advantage is weighted per token by
(1 - pi)^gamma, so that what the policy already does counts little. Neither clip nor KL term applies to them.
Shape legend: R tokens, S sequences, V classes.
"""

import math

import torch


def mixture_log_probs(old_log_probs: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(R,) log of (pi_omega + pi_old) / 2, from the (R,) log-probs of the policy before the update."""
    floor = torch.full_like(old_log_probs, math.log(0.25 / num_classes))
    return torch.logaddexp(old_log_probs + math.log(0.75), floor)


def exploration_advantages(
    advantages: torch.Tensor, cu_seqlens: torch.Tensor, log_probs: torch.Tensor, gamma: float
) -> torch.Tensor:
    """(S,) advantages -> (R,), each token's weighted by (1 - probability)^gamma; `log_probs` (R,)."""
    per_token = advantages.repeat_interleave(cu_seqlens.diff().long())
    return per_token * (-torch.expm1(log_probs.clamp(max=0))) ** gamma
