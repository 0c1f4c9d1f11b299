"""What takes part in a benchmark: a function of differentiable leaves, called forward alone or with its gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


def nothing():
    pass


@dataclass(frozen=True)
class Contestant:
    """One provider's way to compute an op, on one problem."""

    function: Callable  # of the leaves; gives one tensor
    leaves: tuple
    read: Callable = tuple  # from (output, *gradients) to the layout of the problem; not timed
    before: Callable = nothing  # runs before each call; not timed

    def forward(self):
        with torch.no_grad():
            return (self.function(*self.leaves),)

    def forward_and_backward(self, upstream=None):
        """(output, and the gradient of each leaf that wants one)."""
        output = self.function(*self.leaves)
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        return output.detach(), *torch.autograd.grad(output, wanted, upstream)
