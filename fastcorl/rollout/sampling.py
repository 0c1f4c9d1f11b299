"""Sampling with counter-based noise: a row's noise depends on its seed, the step and the token id, on nothing else.

So a row draws the same tokens whatever its neighbours, its place in the batch or the rank it runs on.
"""

import hashlib

import torch

_MASK = 0xFFFFFFFF


def row_seed(*parts: object) -> int:
    """A 32-bit seed for a row from what identifies it (run seed, step, prompt id, index in the group, modality)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "little")


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers with good avalanche (Wellons' lowbias32), on int64 tensors."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def gumbel_noise(seeds: torch.Tensor, step: int, num_tokens: int) -> torch.Tensor:
    """(n,) int64 seeds -> (n, num_tokens) float32 standard Gumbel noise, a pure function of (seed, step, token id)."""
    tokens = torch.arange(num_tokens, device=seeds.device)
    # `_mix` maps 0 to 0; the offset keeps the plainest key, seed 0 at step 0, away from it.
    rows = _mix(_mix(seeds + 0x9E3779B9 & _MASK) + step & _MASK)
    bits = _mix(_mix(rows[:, None] + tokens & _MASK) ^ rows[:, None])
    # High noise comes from a small uniform, where float32 is fine-grained; 1 would give infinite noise.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def sample(
    logits: torch.Tensor, seeds: torch.Tensor, step: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from softmax(logits / temperature) by the Gumbel-max trick; temperature 0 is greedy.

    Args: `logits` (n, V), any float type; `seeds` (n,) int64.
    Returns: tokens (n,) int64 and their log-probs (n,) float32 (at temperature 1 when greedy).
    """
    scaled = logits.float() / (temperature or 1.0)
    noisy = scaled + gumbel_noise(seeds, step, logits.shape[-1]) if temperature else scaled
    tokens = noisy.argmax(-1)
    return tokens, scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
