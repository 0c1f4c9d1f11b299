"""How tokens are sampled, and the seed that makes a row reproducible."""

import hashlib
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How a call samples.

    `temperature` 0 is greedy; `guidance` w mixes logits of drawings as u + w (c - u), 1 runs the conditional branch
    alone; `max_new_tokens` ends answers; `top_k` and `top_p` restrict what is drawn, not the log-probs.
    """

    temperature: float = 1.0
    guidance: float = 1.0
    max_new_tokens: int = 512
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and 0 <= self.guidance < math.inf):
            raise ValueError(
                f"temperature {self.temperature} and guidance {self.guidance} must be numbers of at least 0"
            )
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be over 0 and at most 1")


def row_seed(*parts: object) -> int:
    """A 32-bit seed for a row from what identifies it (run seed, step, prompt id, index in the group, modality)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "little")
