"""The two networks that LPIPS runs on, as layers and as files: torchvision's weights and LPIPS's linear heads.

torchvision itself is not needed: its state dicts name a layer of the trunk by its place in `features`.
"""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastcorl.errors import UserError

TRUNK_KEY = "rewards.lpips_trunk"
HEADS_KEY = "rewards.lpips_heads"
# one file per network in each of these folders; the packages bring the same numbers, of LPIPS's version 0.1
_HEAD_FOLDERS = {"torchmetrics": "functional/image/lpips_models", "lpips": "weights/v0.1"}
_HEAD_NAME = re.compile(r"(?:lin|lins\.)(\d)\.(?:model\.[01]\.)?weight")


class Network(NamedTuple):
    """Layers up to the last feature map that LPIPS reads."""

    title: str
    file: str  # as torchvision calls it
    make_layers: Callable[[], list[nn.Module]]
    taps: tuple[int, ...]  # whose outputs are read, all after a ReLU
    channels: tuple[int, ...]  # of these outputs
    smallest: int  # shortest side of an image, in pixels, that leaves every map a pixel


def _convolution(*args: int, **kwargs: int) -> list[nn.Module]:
    return [nn.Conv2d(*args, **kwargs), nn.ReLU(inplace=True)]


def _vgg16_layers() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            layers += _convolution(channels, width, 3, padding=1)
            channels = width
    return layers


def _alexnet_layers() -> list[nn.Module]:
    return [
        *_convolution(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, stride=2),
        *_convolution(64, 192, 5, padding=2),
        nn.MaxPool2d(3, stride=2),
        *_convolution(192, 384, 3, padding=1),
        *_convolution(384, 256, 3, padding=1),
        *_convolution(256, 256, 3, padding=1),
    ]


NETWORKS = {
    "vgg": Network("VGG-16", "vgg16-*.pth", _vgg16_layers, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "alex": Network("AlexNet", "alexnet-*.pth", _alexnet_layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
}


def load_trunk(net: str, path: str | Path) -> nn.Sequential:
    """Layers of `NETWORKS[net]` with the weights of a torchvision state dict, .pth or .safetensors, in float32.

    Raises UserError where the file is missing, is not such a file, or lacks a layer or holds another shape or a NaN.
    """
    network = NETWORKS[net]
    advice = f"give torchvision's {network.file} or the same as .safetensors"
    tensors = _read_tensors(path, TRUNK_KEY, advice)
    with torch.device("meta"):  # neither time nor random numbers are spent on initial weights
        trunk = nn.Sequential(*network.make_layers())
    wanted = {f"features.{name}": tensor.shape for name, tensor in trunk.state_dict().items()}
    found = _checked(tensors, wanted, f"{TRUNK_KEY}: {path} is no {network.title}", advice)
    trunk.load_state_dict({name.removeprefix("features."): tensor for name, tensor in found.items()}, assign=True)
    return trunk.eval().requires_grad_(False)


def load_heads(net: str, path: str | Path | None = None) -> list[torch.Tensor]:
    """LPIPS's channel weights of each map of `NETWORKS[net]`, (C,) float32 and not negative.

    Without `path` they are those that an installed torchmetrics or lpips brings. The tensors (1, C, 1, 1) are called
    `lin0.model.1.weight` (in both packages), `lin0.model.0.weight` or `lin0.weight`, or the same with `lins.0`. Raises
    UserError where there is no such file, and as `load_trunk` does.
    """
    network = NETWORKS[net]
    advice = f"give LPIPS's v0.1 {net}.pth or leave it out with torchmetrics installed"
    if path is None:
        path = _packaged_heads(f"{net}.pth")
    named = ((_HEAD_NAME.fullmatch(name), tensor) for name, tensor in _read_tensors(path, HEADS_KEY, advice).items())
    tensors = {f"lin{match[1]}": tensor for match, tensor in named if match}
    wanted = {f"lin{layer}": torch.Size((1, channels, 1, 1)) for layer, channels in enumerate(network.channels)}
    problem = f"{HEADS_KEY}: {path} does not hold LPIPS's heads on {network.title}"
    heads = _checked(tensors, wanted, problem, advice)
    for name, head in heads.items():
        if (head < 0).any():
            raise UserError(f"{problem}: {name} has negative weights; {advice}")
    return [head.flatten() for head in heads.values()]


def _packaged_heads(file: str) -> Path:
    for package, folder in _HEAD_FOLDERS.items():
        spec = find_spec(package)  # does not import the package: lpips would import torchvision
        for root in (spec and spec.submodule_search_locations) or ():
            if (path := Path(root, folder, file)).is_file():
                return path
    raise UserError(
        f"{HEADS_KEY}: no {file} found, as neither torchmetrics nor lpips is installed; "
        "pip install 'fastcorl[rewards]' or give the file"
    )


def _read_tensors(path: str | Path, key: str, advice: str) -> dict[str, torch.Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: {path} is not a file; {advice}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: {path} cannot be read as weights ({reason}); {advice}") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{key}: {path} holds a {type(tensors).__name__}, not a state dict; {advice}")
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def _checked(
    tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Size], problem: str, advice: str
) -> dict[str, torch.Tensor]:
    """The wanted tensors in float32."""
    missing = [name for name in wanted if name not in tensors]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{problem}: it lacks {missing[0]}{others}; {advice}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UserError(f"{problem}: {name} is {tuple(tensors[name].shape)}, not {tuple(shape)}; {advice}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{problem}: {name} has values that are not finite; {advice}")
    return {name: tensors[name].float() for name in wanted}
