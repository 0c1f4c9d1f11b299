"""LPIPS, version 0.1 (Zhang et al. 2018, arXiv 1801.03924), on VGG-16 or AlexNet.

Numbers are torchmetrics', whose 1e-8 stands under the root of a feature's norm; the original adds 1e-10 to the norm,
which is another number only where features vanish.
Shape legend: n drawings, k other images, n / k drawings for each; C channels of a layer.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fastcorl.rewards.images.groups import PIXELS_PER_PASS, compare_groups, require_size
from fastcorl.rewards.images.lpips_weights import NETWORKS, load_heads, load_trunk


class LPIPS(nn.Module):
    """Distance of images in [0, 1], without an upper bound; `net` is "vgg" or "alex"."""

    def __init__(self, net: str, trunk: nn.Sequential, heads: list[torch.Tensor]) -> None:
        """`trunk` and `heads` as `load_trunk` and `load_heads` return them."""
        super().__init__()
        self.net = net
        self.trunk = trunk
        for layer, head in enumerate(heads):
            self.register_buffer(f"head{layer}", head.view(1, -1, 1, 1))
        # from [-1, 1] to ImageNet's normalisation, in LPIPS's own digits
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @classmethod
    def from_files(cls, net: str, trunk: str | Path, heads: str | Path | None = None) -> "LPIPS":
        """Read torchvision's weights and LPIPS's heads (None: those of an installed package); UserErrors as there."""
        return cls(net, load_trunk(net, trunk), load_heads(net, heads))

    def features(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """(n, 3, H, W) in [0, 1] -> maps (n, C, h, w) of unit vectors, one after another, in the trunk's dtype."""
        require_size(f"lpips_{self.net}", pixels, NETWORKS[self.net].smallest)
        hidden = (2 * pixels.to(self.shift) - 1 - self.shift) / self.scale
        for index, layer in enumerate(self.trunk):
            hidden = layer(hidden)
            if index in NETWORKS[self.net].taps:
                yield hidden / (hidden.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()

    def distance(self, pixels: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
        """Drawings (n, 3, H, W) against the `features` of k images -> (n,) in the trunk's dtype.

        Of the drawings only one map at a time is kept.
        """
        total = pixels.new_zeros(len(pixels), dtype=self.shift.dtype)
        for layer, (maps, target) in enumerate(zip(self.features(pixels), targets, strict=True)):
            squares = (maps.unflatten(0, (len(target), -1)) - target[:, None]).square().flatten(0, 1)
            total = total + nn.functional.conv2d(squares, self.get_buffer(f"head{layer}")).mean(dim=(1, 2, 3))
        return total

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Both (n, 3, H, W) in [0, 1] -> (n,) distances, 0 for equal images."""
        return self.distance(images, list(self.features(others)))


class LPIPSSimilarity:
    """1 - LPIPS as an `ImageSimilarity` in [0, 1].

    LPIPS has no upper bound, while CoRL takes 1 - LPIPS for a number in [0, 1]: where LPIPS is more than 1 this is 0.
    """

    range = (0.0, 1.0)

    def __init__(self, lpips: LPIPS, pixels_per_pass: int = PIXELS_PER_PASS) -> None:
        """`pixels_per_pass` bounds the memory: VGG-16 takes about 0.16 GiB per drawing of 384 x 384, AlexNet 0.015."""
        self.lpips = lpips
        self.pixels_per_pass = pixels_per_pass

    @torch.no_grad()
    def __call__(self, drawn: torch.Tensor, real: torch.Tensor, group_size: int) -> torch.Tensor:
        distance = compare_groups(
            drawn,
            real,
            group_size,
            describe=lambda images: list(self.lpips.features(images)),
            compare=self.lpips.distance,
            pixels_per_pass=self.pixels_per_pass,
        )
        return (1 - distance).clamp(min=0)
