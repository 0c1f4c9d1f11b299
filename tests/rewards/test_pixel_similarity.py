"""Pixel similarities against their definitions in float64."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastcorl.errors import UserError
from fastcorl.rewards.images.pixels import MAX_PSNR, PIXEL_MEASURES, PixelSimilarity


def ssim_by_scipy(a, b):
    """Wang et al. 2004, equation 13 averaged over pixels and channels, for (3, H, W) float64."""

    def smooth(plane):
        return gaussian_filter(plane, 1.5, truncate=3.5, mode="mirror")

    values = []
    for x, y in zip(a, b, strict=True):
        mean_x, mean_y = smooth(x), smooth(y)
        variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
        covariance = smooth(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        upper = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values.append(upper / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return np.mean(values)


DEFINITIONS = {
    "ssim": ssim_by_scipy,
    "psnr": lambda a, b: -10 * math.log10(np.mean((a - b) ** 2)),
    "mse": lambda a, b: 1 - np.mean((a - b) ** 2),
    "rmse": lambda a, b: 1 - math.sqrt(np.mean((a - b) ** 2)),
}


def drawings_and_images(prompts=3, group=4, size=(24, 17)):
    """Drawings from close to far from their images."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(prompts, 3, *size, generator=generator)
    noise = torch.rand(prompts * group, 3, *size, generator=generator)
    share = torch.linspace(0.05, 1, group).repeat(prompts)[:, None, None, None]
    return (1 - share) * real.repeat_interleave(group, dim=0) + share * noise, real


@pytest.mark.parametrize("pixels_per_pass", [1, 3 * 24 * 17, 9 * 24 * 17, 10**9])
@pytest.mark.parametrize("kind", sorted(PIXEL_MEASURES))
def test_equals_the_definition_for_each_pair(kind, pixels_per_pass):
    drawn, real = drawings_and_images()
    values = PixelSimilarity(kind, pixels_per_pass)(drawn, real, 4)
    expected = [DEFINITIONS[kind](row.double().numpy(), real[i // 4].double().numpy()) for i, row in enumerate(drawn)]
    torch.testing.assert_close(values, torch.tensor(expected).float(), rtol=1e-5, atol=2e-6)
    low, high = PixelSimilarity(kind).range
    assert ((values > low) & (values < high)).all()
    assert (values.view(3, 4).diff(dim=1) < 0).all()


@pytest.mark.parametrize("kind", sorted(PIXEL_MEASURES))
def test_one_pair(kind):
    drawn, real = drawings_and_images(prompts=1, group=1)
    values = PixelSimilarity(kind)(drawn, real, 1)
    expected = DEFINITIONS[kind](drawn[0].double().numpy(), real[0].double().numpy())
    assert values.shape == (1,)
    assert values.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", sorted(PIXEL_MEASURES))
def test_equal_images_have_the_greatest_value_and_it_is_finite(kind):
    similarity = PixelSimilarity(kind)
    drawn, real = drawings_and_images(group=1)
    values = similarity(real, real, 1)
    torch.testing.assert_close(values, torch.full((3,), similarity.range[1]))
    assert (values <= torch.tensor(similarity.range[1])).all()
    assert (similarity(drawn, real, 1) < values).all()


@pytest.mark.parametrize(("kind", "value"), [("psnr", 0.0), ("mse", 0.0), ("rmse", 0.0), ("ssim", 1e-4)])
def test_black_and_white(kind, value):
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert PixelSimilarity(kind)(black, white, 1).item() == pytest.approx(value, abs=1e-6)


def test_ssim_of_the_negative_is_less_than_zero():
    image = torch.rand(1, 3, 32, 32)
    assert -1 <= PixelSimilarity("ssim")(image, 1 - image, 1).item() < -0.5


def test_psnr_ends_at_one_grey_level():
    similarity = PixelSimilarity("psnr")
    image = torch.full((1, 3, 8, 8), 0.5)
    assert pytest.approx(48.1308, abs=1e-4) == MAX_PSNR
    assert similarity(image, image + 1.001 / 255, 1).item() == pytest.approx(
        MAX_PSNR - 20 * math.log10(1.001), abs=1e-3
    )
    assert similarity(image, image + 0.5 / 255, 1).item() == pytest.approx(MAX_PSNR)


@pytest.mark.parametrize("kind", sorted(PIXEL_MEASURES))
def test_a_drawing_that_is_not_a_number_is_a_nan_and_no_gradient_is_kept(kind):
    drawn, real = drawings_and_images(group=2)
    drawn[3, 1, 4, 4] = torch.nan
    values = PixelSimilarity(kind)(drawn.requires_grad_(), real, 2)
    assert values.isnan().tolist() == [row == 3 for row in range(6)]
    assert not values.requires_grad


@pytest.mark.parametrize("kind", sorted(PIXEL_MEASURES))
def test_without_torchmetrics(kind, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("torchmetrics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(
        UserError, match=rf"rewards\.image_similarity: {kind} needs .*pip install 'fastcorl\[rewards\]'"
    ):
        PixelSimilarity(kind)


def test_ssim_needs_six_pixels():
    assert PixelSimilarity("ssim")(torch.rand(2, 3, 6, 6), torch.rand(1, 3, 6, 6), 2).isfinite().all()
    with pytest.raises(UserError, match=r"ssim needs drawings of at least 6 x 6 pixels, and the model's are 9 x 5"):
        PixelSimilarity("ssim")(torch.rand(2, 3, 9, 5), torch.rand(1, 3, 9, 5), 2)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (6, 3, 8, 9)])
def test_drawings_must_fit_the_images(shape):
    with pytest.raises(ValueError, match="are not 2 for each of the real images"):
        PixelSimilarity("mse")(torch.rand(*shape), torch.rand(3, 3, 8, 8), 2)
