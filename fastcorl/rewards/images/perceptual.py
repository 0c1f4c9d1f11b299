"""The image half of CoRL's cycle reward (arXiv 2505.17534, section 3.2): a drawing against its prompt's real image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import nn

from fastcorl.errors import UserError
from fastcorl.records import Rollout
from fastcorl.rewards.images.groups import ImageSimilarity
from fastcorl.rewards.images.lpips import LPIPS, LPIPSSimilarity
from fastcorl.rewards.images.lpips_weights import NETWORKS, TRUNK_KEY
from fastcorl.rewards.images.pixels import PIXEL_MEASURES, PixelSimilarity
from fastcorl.rewards.images.vq import VQFeatures, VQSimilarity


def make_image_similarity(
    kind: str,
    *,
    vq_encoder: nn.Module | None,
    trunk: str | Path | None = None,
    heads: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> ImageSimilarity:
    """The similarity that `rewards.image_similarity` names: vq, lpips_vgg, lpips_alex, ssim, psnr, mse or rmse.

    vq reads `vq_encoder` (`janus.model.vqmodel.encoder`) where it is; the others need none. LPIPS reads the file
    `trunk`, torchvision's weights, and the file `heads`, or where that is None those of an installed package, and goes
    to `device`. Raises UserError where a file or torchmetrics is missing or the file is not what it should be.
    """
    if kind == "vq":
        return VQSimilarity(VQFeatures(vq_encoder))
    if kind in PIXEL_MEASURES:
        return PixelSimilarity(kind)
    net = kind.removeprefix("lpips_")
    if net == kind or net not in NETWORKS:
        raise ValueError(f"there is no image similarity {kind!r}")
    if trunk is None:
        title, file = NETWORKS[net].title, NETWORKS[net].file
        raise UserError(f"{TRUNK_KEY}: {kind} needs the weights of {title}; give torchvision's {file}")
    return LPIPSSimilarity(LPIPS.from_files(net, trunk, heads).to(device))


def to_pixels(images: Sequence[Image], size: tuple[int, int]) -> torch.Tensor:
    """PIL images -> (P, 3, H, W) float32 in [0, 1], each resized to `size` = (H, W)."""
    height, width = size
    arrays = [np.asarray(image.convert("RGB").resize((width, height), Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


class PerceptualReward:
    """Similarity of a row's drawing and its prompt's real image, which is resized to the drawing's size."""

    def __init__(self, similarity: ImageSimilarity) -> None:
        self.similarity = similarity

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest reward."""
        return self.similarity.range

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """-> (n,) float32 in `range`, NaN for a drawing that holds a NaN."""
        drawn = rollout.images.pixels
        real = to_pixels([prompt.image for prompt in rollout.prompts], drawn.shape[-2:]).to(drawn.device)
        return self.similarity(drawn, real, rollout.group_size)
