"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on the backbone's linear layers, by peft."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

NAME = "default"


class Adapter(NamedTuple):
    """The layer adds scaling * up(down(x)); `down` (rank, in), `up` (out, rank)."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


def add_adapters(backbone: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put an adapter that changes nothing yet on each layer named in `targets`. No dropout: it would make the trained
    distribution differ from the sampled one."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, backbone, adapter_name=NAME)
    for layer in adapted_layers(backbone):
        layer.lora_A.to(layer.weight.device, layer.weight.dtype)
        layer.lora_B.to(layer.weight.device, layer.weight.dtype)


def adapted_layers(module: nn.Module) -> list[LoraLayer]:
    """The layers below `module` that have an adapter, in the module's order."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def adapter_of(linear: nn.Module) -> Adapter | None:
    """The adapter that `linear` applies at present, if any."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return None
    return Adapter(linear.lora_A[NAME].weight, linear.lora_B[NAME].weight, linear.scaling[NAME])


def effective_weight(linear: nn.Module) -> torch.Tensor:
    """(out, in) weight of the one product that does what `linear` does."""
    adapter, weight = adapter_of(linear), linear.weight.detach()
    if adapter is None:
        return weight
    change = adapter.up.detach().float() @ adapter.down.detach().float() * adapter.scaling
    return (weight.float() + change).to(weight.dtype)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside the block the layers do what they did before they got adapters."""
    layers = adapted_layers(module)
    # Not `enable_adapters`, which would also change what requires a gradient.
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def merged_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the same module without adapters, their changes added to the weights."""
    state = {}
    changed = {
        f"{name}.base_layer.weight": layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)
    }
    for name, tensor in module.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        tensor = effective_weight(changed[name]) if name in changed else tensor
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def save_adapters(module: nn.Module, folder: Path) -> None:
    """Write the adapters of `module` as peft's `PeftModel.from_pretrained(module, folder)` reads them."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    names = sorted({name.rpartition(".")[2] for name in layers})
    parents = {re.escape(name.partition(".layers.")[0]) for name in layers}
    first = next(iter(layers.values()))
    LoraConfig(
        r=first.r[NAME],
        lora_alpha=first.lora_alpha[NAME],
        # As a pattern, since the vision tower has layers of the same names.
        target_modules=rf"(?:{'|'.join(sorted(parents))})\.layers\.\d+\..*\.(?:{'|'.join(names)})",
        lora_dropout=0.0,
        bias="none",
    ).save_pretrained(str(folder))
    tensors = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[NAME].weight.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.{part}.weight"] = weight
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
