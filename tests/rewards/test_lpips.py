"""LPIPS against torchmetrics' own, which runs here on a stand-in for torchvision's two networks."""

import sys
from copy import deepcopy
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from fastcorl.errors import UserError
from fastcorl.rewards.images.lpips import LPIPS, LPIPSSimilarity
from fastcorl.rewards.images.lpips_weights import load_heads, load_trunk

SIZES = [(32, 32), (64, 48), (37, 81)]
TORCHVISION_NAMES = {"vgg": "vgg16", "alex": "alexnet"}


def relu(*convolution, **options):
    return nn.Conv2d(*convolution, **options), nn.ReLU(inplace=True)


def torchvision_features(net):
    """`features` as torchvision documents it; a layer's place names its weights."""
    if net == "alex":
        return nn.Sequential(
            *relu(3, 64, kernel_size=11, stride=4, padding=2),
            nn.MaxPool2d(kernel_size=3, stride=2),
            *relu(64, 192, kernel_size=5, padding=2),
            nn.MaxPool2d(kernel_size=3, stride=2),
            *relu(192, 384, kernel_size=3, padding=1),
            *relu(384, 256, kernel_size=3, padding=1),
            *relu(256, 256, kernel_size=3, padding=1),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
    layers, channels = [], 3
    for width in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]:
        if width == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += relu(channels, width, kernel_size=3, padding=1)
            channels = width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def features():
    """Both networks with random weights that keep features alive through all layers."""
    torch.manual_seed(0)
    networks = {net: torchvision_features(net) for net in TORCHVISION_NAMES}
    for network in networks.values():
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.normal_(layer.bias, std=0.1)
    return networks


@pytest.fixture(scope="module")
def trunks(features, tmp_path_factory):
    """State dicts as torchvision saves them, classifier included."""
    folder = tmp_path_factory.mktemp("trunks")
    files = {}
    for net, network in features.items():
        state = {f"features.{name}": tensor for name, tensor in network.state_dict().items()}
        state["classifier.6.bias"] = torch.zeros(1000)
        files[net] = folder / f"{TORCHVISION_NAMES[net]}-0.pth"
        torch.save(state, files[net])
    return files


@pytest.fixture
def torchmetrics_lpips(features, monkeypatch):
    """torchmetrics' function (images, others, net) -> (n,), with its own heads, on `features`."""
    models = ModuleType("torchvision.models")
    for net, name in TORCHVISION_NAMES.items():
        setattr(models, name, lambda weights, network=features[net]: SimpleNamespace(features=deepcopy(network)))
    models.VGG16_Weights = models.AlexNet_Weights = SimpleNamespace(DEFAULT="random")
    torchvision = ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(
        sys.modules[learned_perceptual_image_patch_similarity.__module__], "_TORCHVISION_AVAILABLE", True
    )

    def lpips(images, others, net):
        return learned_perceptual_image_patch_similarity(images, others, net, reduction="none", normalize=True)

    return lpips


def image_pairs(size, n=3):
    """Close, far and unlike: noise on one image, another image, a flat one."""
    generator = torch.Generator().manual_seed(size[1])
    images, others = torch.rand(2, n, 3, *size, generator=generator)
    others[0] = (images[0] + 0.05 * others[0]).clamp(0, 1)
    others[2] = 0.3
    return images, others


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_torchmetrics(net, size, trunks, torchmetrics_lpips):
    images, others = image_pairs(size)
    ours = LPIPS.from_files(net, trunks[net])(images, others)
    torch.testing.assert_close(ours, torchmetrics_lpips(images, others, net), rtol=1e-5, atol=1e-7)
    assert 0 < ours[0] < ours[1] and (ours > 1e-4).all()


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_torchmetrics_in_float64_and_float32_is_near(net, trunks, torchmetrics_lpips):
    images, others = image_pairs((45, 33))
    lpips = LPIPS.from_files(net, trunks[net])
    single = lpips(images, others)
    double = lpips.double()(images.double(), others.double())
    theirs = torchmetrics_lpips(images.double(), others.double(), net)
    assert double.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(double, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("net", ["vgg", "alex"])
@pytest.mark.parametrize("pixels_per_pass", [1, 2 * 40 * 32, 7 * 40 * 32, 10**9])
def test_groups_equal_pairs(net, pixels_per_pass, trunks):
    lpips = LPIPS.from_files(net, trunks[net])
    drawn, real = torch.rand(9, 3, 40, 32), torch.rand(3, 3, 40, 32)
    drawn[4] = real[1]
    drawn[7] = torch.nan
    similarity = LPIPSSimilarity(lpips, pixels_per_pass)
    values = similarity(drawn, real, 3)
    expected = torch.cat([1 - lpips(drawn[i : i + 1], real[i // 3 : i // 3 + 1]) for i in range(9)]).clamp(min=0)
    torch.testing.assert_close(values, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert values.isnan().tolist() == [row == 7 for row in range(9)]
    assert values[4] == values[[0, 1, 2, 3, 4, 5, 6, 8]].max() and values[4].item() == pytest.approx(1.0, abs=1e-6)
    assert values.dtype == torch.float32 and similarity.range == (0.0, 1.0)


def test_real_images_are_described_once_and_passes_are_bounded(trunks, monkeypatch):
    lpips = LPIPS.from_files("alex", trunks["alex"])
    batches = []
    original = lpips.features
    monkeypatch.setattr(lpips, "features", lambda pixels: batches.append(len(pixels)) or original(pixels))
    LPIPSSimilarity(lpips, 4 * 32 * 32)(torch.rand(10, 3, 32, 32), torch.rand(2, 3, 32, 32), 5)
    assert batches == [1, 4, 1, 1, 4, 1]
    batches.clear()
    LPIPSSimilarity(lpips, 4 * 32 * 32)(torch.rand(6, 3, 32, 32), torch.rand(3, 3, 32, 32), 2)
    assert batches == [2, 4, 1, 2]


def test_more_than_1_is_a_similarity_of_0(trunks):
    lpips = LPIPS("alex", load_trunk("alex", trunks["alex"]), [50 * head for head in load_heads("alex")])
    drawn, real = torch.rand(4, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert (lpips(drawn, real.repeat_interleave(2, dim=0)) > 1).all()
    assert torch.equal(LPIPSSimilarity(lpips)(drawn, real, 2), torch.zeros(4))


def test_values_have_no_gradient_and_loading_takes_no_random_numbers(trunks):
    state = torch.get_rng_state()
    lpips = LPIPS.from_files("vgg", trunks["vgg"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    drawn = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not LPIPSSimilarity(lpips)(drawn, torch.rand(1, 3, 32, 32), 1).requires_grad


def test_safetensors_are_read_too(trunks, tmp_path):
    file = tmp_path / "alexnet.safetensors"
    save_file(torch.load(trunks["alex"], weights_only=True), file)
    ours, theirs = load_trunk("alex", file).state_dict(), load_trunk("alex", trunks["alex"]).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "name", ["lin{}.model.1.weight", "lin{}.model.0.weight", "lin{}.weight", "lins.{}.model.1.weight"]
)
def test_heads_of_a_file(name, tmp_path):
    heads = [torch.rand(1, channels, 1, 1) for channels in (64, 192, 384, 256, 256)]
    torch.save(
        {name.format(layer): head for layer, head in enumerate(heads)} | {"other": torch.ones(1)}, tmp_path / "h"
    )
    read = load_heads("alex", tmp_path / "h")
    assert all(torch.equal(ours, head.flatten()) for ours, head in zip(read, heads, strict=True))


def fake_lpips_package(folder, heads):
    (folder / "lpips" / "weights" / "v0.1").mkdir(parents=True)
    (folder / "lpips" / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(heads, folder / "lpips" / "weights" / "v0.1" / "alex.pth")


def test_heads_of_the_lpips_package_without_importing_it(tmp_path, monkeypatch):
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    fake_lpips_package(tmp_path, heads)
    monkeypatch.syspath_prepend(tmp_path)
    ours = load_heads("alex")
    assert not torch.equal(ours[0], heads["lin0.model.1.weight"].flatten())  # torchmetrics' come first
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert torch.equal(load_heads("alex")[0], heads["lin0.model.1.weight"].flatten())


def test_no_package_with_heads(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"rewards\.lpips_heads: no vgg\.pth found.*pip install 'fastcorl\[rewards\]'"):
        load_heads("vgg")


def alexnet_state(trunks, **changes):
    return torch.load(trunks["alex"], weights_only=True) | {name.replace("__", "."): t for name, t in changes.items()}


class Unsafe:
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda trunks: alexnet_state(trunks, features__3__weight=torch.ones(2)),
            r"features\.3\.weight is \(2,\), not",
        ),
        (lambda trunks: alexnet_state(trunks, features__10__bias=torch.full((256,), torch.inf)), "not finite"),
        (lambda trunks: {"weight": torch.ones(1)}, r"lacks features\.0\.weight and 9 more"),
        (lambda trunks: torch.load(trunks["vgg"], weights_only=True), r"lacks features\.3\.weight and 5 more"),
        (lambda trunks: torch.ones(3), "holds a Tensor"),
        (lambda trunks: {"features.0.weight": Unsafe()}, "cannot be read as weights"),
    ],
)
def test_wrong_trunks(make, message, trunks, tmp_path):
    file = tmp_path / "trunk.pth"
    torch.save(make(trunks), file)
    with pytest.raises(UserError, match=message) as caught:
        load_trunk("alex", file)
    text = str(caught.value)
    assert text.startswith("rewards.lpips_trunk: ") and str(file) in text and "alexnet-*.pth" in text
    assert "\n" not in text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x00" * 64])
def test_files_that_are_no_weights(content, suffix, tmp_path):
    file = tmp_path / f"trunk{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rewards\.lpips_trunk: .* cannot be read as weights"):
        load_trunk("vgg", file)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(UserError, match=r"rewards\.lpips_trunk: .* is not a file; give torchvision's vgg16"):
            load_trunk("vgg", path)
        with pytest.raises(UserError, match=r"rewards\.lpips_heads: .* is not a file"):
            load_heads("vgg", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin2.model.1.weight": torch.ones(1, 64, 1, 1)}, r"lin2 is \(1, 64, 1, 1\), not \(1, 384, 1, 1\)"),
        ({"lin4.model.1.weight": torch.full((1, 256, 1, 1), -1.0)}, "lin4 has negative weights"),
        ({"lin4.model.1.weight": None}, "lacks lin4"),
    ],
)
def test_wrong_heads(change, message, tmp_path):
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))} | change
    torch.save(heads, tmp_path / "alex.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_heads("alex", tmp_path / "alex.pth")
    assert str(caught.value).startswith("rewards.lpips_heads: ")


@pytest.mark.parametrize(("net", "smallest"), [("vgg", 16), ("alex", 31)])
def test_drawings_may_not_be_too_small(net, smallest, trunks):
    lpips = LPIPS.from_files(net, trunks[net])
    assert lpips(*torch.rand(2, 1, 3, smallest, smallest)).isfinite()
    with pytest.raises(UserError, match=rf"lpips_{net} needs drawings of at least {smallest} x {smallest} pixels"):
        lpips(torch.rand(1, 3, 64, smallest - 1), torch.rand(1, 3, 64, smallest - 1))
