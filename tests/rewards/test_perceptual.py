import math

import pytest
import torch
from PIL import Image
from torch import nn

from fastcorl.errors import UserError
from fastcorl.rewards.images.lpips_weights import NETWORKS
from fastcorl.rewards.images.perceptual import PerceptualReward, make_image_similarity, to_pixels
from fastcorl.rewards.images.vq import VQFeatures, VQSimilarity, lpips_distance

KINDS = ("vq", "lpips_vgg", "lpips_alex", "ssim", "psnr", "mse", "rmse")


def pyramid(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, channels, side, side, generator=generator) for channels, side in ((4, 5), (7, 2))]


def distance_by_loops(a, b, weights=None):
    rows = []
    for row in range(a[0].shape[0]):
        layers = []
        for layer, (x, y) in enumerate(zip(a, b, strict=True)):
            channels, height, width = x.shape[1:]
            places = []
            for i in range(height):
                for j in range(width):
                    u, v = x[row, :, i, j].tolist(), y[row, :, i, j].tolist()
                    nu, nv = math.hypot(*u), math.hypot(*v)
                    w = [0.5] * channels if weights is None else weights[layer].tolist()
                    places.append(sum(w[c] * (u[c] / nu - v[c] / nv) ** 2 for c in range(channels)))
            layers.append(sum(places) / len(places))
        rows.append(min(1.0, sum(layers) / len(layers)))
    return torch.tensor(rows)


@pytest.mark.parametrize("weighted", [False, True])
def test_distance_equals_loops(weighted):
    a, b = pyramid(0), pyramid(1)
    weights = [torch.rand(4) * 0.4, torch.rand(7) * 0.4] if weighted else None
    torch.testing.assert_close(lpips_distance(a, b, weights), distance_by_loops(a, b, weights))


def test_distance_of_orthogonal_is_1_of_opposite_is_capped_and_of_scaled_is_0():
    x = torch.tensor([[3.0, 0.0]])[:, :, None, None]
    y = torch.tensor([[0.0, 0.1]])[:, :, None, None]
    assert lpips_distance([x], [y]).item() == pytest.approx(1.0)
    assert lpips_distance([x], [-x]).item() == 1.0
    assert lpips_distance([x], [5 * x]).item() == pytest.approx(0.0, abs=1e-6)


def test_distance_is_zero_on_itself_symmetric_and_bounded():
    a, b = pyramid(2), pyramid(3)
    assert torch.equal(lpips_distance(a, a), torch.zeros(3))
    assert torch.equal(lpips_distance(a, b), lpips_distance(b, a))
    assert ((lpips_distance(a, b) > 0) & (lpips_distance(a, b) <= 1)).all()


def test_all_zero_features_give_a_number():
    zero = [torch.zeros(1, 3, 2, 2)]
    assert lpips_distance(zero, zero).item() == 0.0


def test_vq_features_are_the_encoders_own(encoder):
    pixels = torch.rand(2, 3, 32, 32)
    seen = []
    modules = [encoder.conv_in, encoder.down[0].block[-1], encoder.down[1].block[-1], encoder.down[2].attn[-1]]
    hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out.clone())) for m in [*modules, encoder.mid]]
    with torch.no_grad():
        encoder(pixels * 2 - 1)
    for hook in hooks:
        hook.remove()
    features = VQFeatures(encoder)(pixels)
    assert [tuple(f.shape) for f in features] == [(2, 32, 32, 32)] * 2 + [(2, 32, 16, 16), (2, 64, 8, 8), (2, 64, 8, 8)]
    for feature, expected in zip(features, seen, strict=True):
        assert torch.equal(feature, expected)
        assert not feature.requires_grad


def test_to_pixels_resizes_and_converts():
    pixels = to_pixels([Image.new("L", (10, 20), 255), Image.new("RGBA", (7, 7), (255, 0, 0, 10))], (6, 8))
    assert pixels.shape == (2, 3, 6, 8)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], torch.ones(3, 6, 8))
    assert torch.equal(pixels[1, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Files of random weights, by kind."""
    files = {}
    for net, network in NETWORKS.items():
        trunk = nn.Sequential(*network.make_layers())
        for weight in trunk.parameters():
            if weight.dim() == 4:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
        files[f"lpips_{net}"] = tmp_path_factory.mktemp("trunks") / f"{net}.pth"
        torch.save({f"features.{name}": weight for name, weight in trunk.state_dict().items()}, files[f"lpips_{net}"])
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_rewards_the_real_image_most(kind, encoder, trunks, make_rollout):
    reward = PerceptualReward(make_image_similarity(kind, vq_encoder=encoder, trunk=trunks.get(kind)))
    rollout = make_rollout(group_size=3)
    real = to_pixels([prompt.image for prompt in rollout.prompts], (32, 32))
    rollout.images.pixels[1] = real[0]
    rollout.images.pixels[3] = (real[1] + 0.1 * torch.rand(3, 32, 32)).clamp(0, 1)
    rollout.images.pixels[5] = torch.nan
    values = reward(rollout)
    low, high = reward.range
    assert values.shape == (6,) and values.dtype == torch.float32
    assert values.isnan().tolist() == [False] * 5 + [True]
    assert values[1].item() == pytest.approx(high, abs=1e-5)
    assert ((values[:5] >= low) & (values[:5] <= high + 1e-6)).all()
    assert values[1] > values[3] > max(values[0], values[2], values[4])


@pytest.mark.parametrize("kind", ["lpips_vgg", "lpips_alex"])
def test_lpips_without_a_trunk(kind, encoder):
    with pytest.raises(UserError, match=rf"rewards\.lpips_trunk: {kind} needs the weights of .*; give torchvision's"):
        make_image_similarity(kind, vq_encoder=encoder)


@pytest.mark.parametrize("kind", ["vgg", "lpips", "lpips_squeeze", "clip"])
def test_unknown_kinds(kind, encoder):
    with pytest.raises(ValueError, match=f"no image similarity {kind!r}"):
        make_image_similarity(kind, vq_encoder=encoder)


def test_vq_in_one_pass_is_the_distance_of_repeated_features(encoder, make_rollout):
    rollout = make_rollout(group_size=4)
    features = VQFeatures(encoder)
    real = to_pixels([prompt.image for prompt in rollout.prompts], (32, 32))
    targets = [layer.repeat_interleave(4, dim=0) for layer in features(real)]
    expected = 1 - lpips_distance(features(rollout.images.pixels), targets)
    assert torch.equal(PerceptualReward(make_image_similarity("vq", vq_encoder=encoder))(rollout), expected)


@pytest.mark.parametrize("pixels_per_pass", [1, 4 * 32 * 32, 10**9])
def test_reward_equals_row_by_row(encoder, make_rollout, pixels_per_pass):
    rollout = make_rollout(group_size=3)
    features = VQFeatures(encoder)
    rollout.images.pixels[1] = to_pixels([rollout.prompts[0].image], (32, 32))[0]
    reward = PerceptualReward(VQSimilarity(features, pixels_per_pass))(rollout)
    for row in range(rollout.num_rows):
        real = to_pixels([rollout.prompt_of(row).image], (32, 32))
        distance = lpips_distance(features(rollout.images.pixels[row : row + 1]), features(real))
        torch.testing.assert_close(reward[row : row + 1], 1 - distance)
    assert reward[1].item() == pytest.approx(1.0, abs=1e-5)
    assert reward.shape == (6,)
    assert (reward[[0, 2, 3, 4, 5]] < 0.999).all()


def test_each_real_image_is_converted_and_encoded_once(encoder, make_rollout, monkeypatch):
    rollout = make_rollout(group_size=3)
    converted, encoded = [], []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: converted.append(self) or convert(self, mode))
    features = VQFeatures(encoder)
    PerceptualReward(VQSimilarity(lambda pixels: encoded.append(len(pixels)) or features(pixels)))(rollout)
    assert len(converted) == 2
    assert sorted(encoded) == [2, 6]


def test_a_drawing_that_is_not_a_number_is_a_nan(encoder, make_rollout):
    rollout = make_rollout()
    rollout.images.pixels[2] = torch.nan
    assert PerceptualReward(VQSimilarity(VQFeatures(encoder)))(rollout).isnan().tolist() == [False, False, True, False]


def test_scores_can_take_part_in_a_gradient(encoder, make_rollout):
    reward = PerceptualReward(VQSimilarity(VQFeatures(encoder)))(make_rollout())
    weight = torch.ones(4, requires_grad=True)
    (weight * reward).sum().backward()
    assert torch.equal(weight.grad, reward)
