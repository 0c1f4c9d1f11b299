"""Other libraries' GRPO functions by their own names and signatures, on fastcorl_kernels.

``liger`` stands in for Liger-Kernel's GRPO losses, ``trl`` for TRL's log-probabilities. Neither library is needed to
import this package; ``trl.patched`` imports TRL when it is called.
"""

from fastcorl_kernels.compat import liger, trl

__all__ = ["liger", "trl"]
