"""What an op cannot beat: a copy that moves its bytes, or the matrix products that it needs, on the same machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Floor:
    """``run`` does ``work`` bytes ("B") or floating-point operations ("FLOP"), the least that the op can do."""

    run: Callable
    work: int
    unit: str


def copy(work, device):
    """A copy that reads and writes ``work`` bytes in all."""
    source = torch.randint(256, (max(work // 2, 1),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Floor(lambda: target.copy_(source), work, "B")


def matmuls(shape, kept, forward_only=False):
    """The head's products on the ``kept`` rows: logits, the hidden states' gradient and, if trained, the weight's."""
    options = dict(dtype=shape.dtype, device=shape.device)
    hidden = torch.randn(kept, shape.hidden, **options)
    weight = torch.randn(shape.vocabulary, shape.hidden, **options)
    logits = torch.randn(kept, shape.vocabulary, **options)
    grad_logits = torch.randn_like(logits)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    products = [(hidden, weight.T, logits)]
    if not forward_only:
        products.append((grad_logits, weight, grad_hidden))
        if shape.trained:
            products.append((grad_logits.T, hidden, grad_weight))

    def run():
        for left, right, product in products:
            torch.mm(left, right, out=product)

    return Floor(run, 2 * kept * shape.hidden * shape.vocabulary * len(products), "FLOP")
