"""Perceptual distance in LPIPS's form (Zhang et al. 2018, eq. 1), over the features of the policy's own VQ encoder.

The encoder is frozen, so the distance means the same thing throughout training and needs no further network.
Shape legend: n rows, P prompts, G group size, C channels of a layer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import nn

from fastcorl.records import Rollout


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


def to_pixels(images: Sequence[Image], size: tuple[int, int]) -> torch.Tensor:
    """PIL images -> (P, 3, H, W) float32 in [0, 1], each resized to `size` = (H, W)."""
    height, width = size
    arrays = [np.asarray(image.convert("RGB").resize((width, height), Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


class PerceptualReward:
    """1 - distance between a row's drawing and its prompt's real image, in [0, 1]."""

    def __init__(self, features: VQFeatures, pixels_per_pass: int = 16 * 384 * 384) -> None:
        """`pixels_per_pass` bounds the memory: Janus-Pro's maps take about 0.15 GiB per drawing of 384 x 384."""
        self.features = features
        self.pixels_per_pass = pixels_per_pass

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        drawn, group = rollout.images.pixels, rollout.group_size
        real = to_pixels([prompt.image for prompt in rollout.prompts], drawn.shape[-2:]).to(drawn.device)
        prompts_per_pass = max(1, self.pixels_per_pass // (drawn.shape[-2] * drawn.shape[-1] * group))
        distances = [
            lpips_distance(
                self.features(rows),
                [layer.repeat_interleave(group, dim=0) for layer in self.features(targets)],
            )
            for rows, targets in zip(drawn.split(prompts_per_pass * group), real.split(prompts_per_pass), strict=True)
        ]
        return 1 - torch.cat(distances)
