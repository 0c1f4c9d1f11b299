"""The frozen policy of the KL term, and of a frozen matching reward: what the stage started from."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Reference:
    """`with reference.policy() as policy:` gives the policy as it was when this was built, on the trained one's device.

    Args:
        policy: the policy that is trained, with whole weights.
        where: "keep" a copy on the device; "offload" a copy that is in host memory between uses; "swap" keeps the
            trained parts in host memory and puts them in the place of the present ones inside the block, so that the
            device never holds two models. A policy with adapters is its own reference without them, whatever this says.
    """

    def __init__(self, policy: nn.Module, where: str):
        self.trained = policy
        self.where = "adapters" if policy.has_adapters else where
        self.copy: nn.Module | None = None
        self.start: dict[str, torch.Tensor] = {}
        if self.where in ("keep", "offload"):
            self.copy = copy.deepcopy(policy).requires_grad_(False)
            if self.where == "keep":
                self.copy.lay_out()
            else:
                self.copy.to("cpu")
                self.start = {name: weight.data for name, weight in self.copy.named_parameters()}
        elif self.where == "swap":
            self.start = {name: _host_copy(weight) for name, weight in self._changing()}

    @property
    def stays(self) -> bool:
        """Whether every block gives the same weights in the same memory."""
        return self.where == "keep"

    @contextmanager
    def policy(self) -> Iterator[nn.Module]:
        if self.where == "adapters":
            with self.trained.without_adapters():
                yield self.trained
        elif self.where == "swap":
            now = {name: _host_copy(weight) for name, weight in self._changing()}
            self._put(self.start)
            try:
                yield self.trained
            finally:
                self._put(now)
        else:
            device = self.trained.device
            try:
                yield self.copy.to(device)
            finally:
                if self.where == "offload":
                    for name, weight in self.copy.named_parameters():
                        weight.data = self.start[name]

    def _changing(self) -> Iterator[tuple[str, nn.Parameter]]:
        # By the policy's own rule: under ZeRO 3 this is the copy that is sampled with, none of which has gradients.
        yield from self.trained.trained_parameters()

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self._changing():
            weight.copy_(weights[name])


def _host_copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to("cpu", copy=True)
