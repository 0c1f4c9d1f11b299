"""Linear layers that read the same input, laid side by side in memory so that one product serves them all."""

from collections.abc import Sequence

import torch
from torch import nn


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view of weights (n_i, ...) that follow one another in memory, (sum of n_i, ...); None where they do not."""
    first = weights[0].detach()
    expected = first.data_ptr()
    for weight in weights:
        same_storage = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and weight.is_contiguous() and weight.data_ptr() == expected):
            return None
        expected += weight.nbytes
    return first.as_strided((sum(len(weight) for weight in weights), *first.shape[1:]), first.stride())


@torch.no_grad()
def lay_side_by_side(backbone: nn.Module) -> None:
    """Move the weights of a Llama that a decoder reads as one (query, key and value; gate and up) into joint storage;
    modules, names and values stay.

    Moving the model or handing it to an optimizer that flattens its weights may part them again; a decoder then works
    on copies.
    """
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            weights = [linear.weight for linear in linears]
            joint = torch.cat([weight.data for weight in weights])
            for weight, part in zip(weights, joint.split([len(weight) for weight in weights]), strict=True):
                weight.data = part
