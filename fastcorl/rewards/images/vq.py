"""Perceptual distance in LPIPS's form (Zhang et al. 2018, eq. 1), over the features of the policy's own VQ encoder.

The encoder is frozen, so the distance means the same thing throughout training and needs no further network.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fastcorl.rewards.images.groups import PIXELS_PER_PASS, compare_groups


def lpips_distance(
    features_a: Sequence[torch.Tensor],
    features_b: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Distance of n pairs of feature pyramids, each layer (n, C, H, W) -> (n,) float32 in [0, 1].

    Features are unit-normalised over channels, their squared differences weighted and summed over channels, averaged
    over space, then over layers, and capped at 1. `weights` holds one (C,) tensor per layer. Without it every weight
    is 1/2, which makes a layer's distance 1 - cosine: 0 for equal directions, 1 for orthogonal ones.
    """
    total = torch.zeros(features_a[0].shape[0], dtype=torch.float32, device=features_a[0].device)
    for layer, (a, b) in enumerate(zip(features_a, features_b, strict=True)):
        difference = nn.functional.normalize(a.float(), dim=1) - nn.functional.normalize(b.float(), dim=1)
        scale = 0.5 if weights is None else weights[layer].float()[:, None, None]
        total += (scale * difference.square()).sum(dim=1).mean(dim=(1, 2))
    return (total / len(features_a)).clamp(0, 1)


class VQFeatures:
    """Feature maps of a Janus VQ encoder (`janus.model.vqmodel.encoder`)."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(n, 3, H, W) in [0, 1] -> maps (n, C, h, w): after the first convolution, each resolution, the middle."""
        encoder = self.encoder
        hidden = encoder.conv_in(pixels.to(encoder.conv_in.weight) * 2 - 1)
        features = [hidden]
        last = len(encoder.down) - 1
        for index, level in enumerate(encoder.down):
            for number, block in enumerate(level.block):
                hidden = block(hidden)
                if len(level.attn) > 0:
                    hidden = level.attn[number](hidden)
            features.append(hidden)
            if index != last:
                hidden = level.downsample(hidden)
        return [*features, encoder.mid(hidden)]


class VQSimilarity:
    """1 - `lpips_distance` on the VQ encoder's features: an `ImageSimilarity` in [0, 1]."""

    range = (0.0, 1.0)

    def __init__(self, features: VQFeatures, pixels_per_pass: int = PIXELS_PER_PASS) -> None:
        """`pixels_per_pass` bounds the memory: Janus-Pro's maps take about 0.15 GiB per drawing of 384 x 384."""
        self.features = features
        self.pixels_per_pass = pixels_per_pass

    @torch.no_grad()
    def __call__(self, drawn: torch.Tensor, real: torch.Tensor, group_size: int) -> torch.Tensor:
        return 1 - compare_groups(
            drawn,
            real,
            group_size,
            describe=self.features,
            compare=self._distance,
            pixels_per_pass=self.pixels_per_pass,
        )

    def _distance(self, rows: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
        repeats = len(rows) // len(targets[0])
        return lpips_distance(self.features(rows), [layer.repeat_interleave(repeats, dim=0) for layer in targets])
