"""Linear layers as sampling runs them: without gradient, on the policy's own weights."""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from fastcorl.model.adapters import Adapter, adapter_of, effective_weight
from fastcorl.model.projections import side_by_side

PACKED_FOR = 128  # rows that oneDNN's layout is chosen for; it serves all other numbers, but not the other way round


class JointLinear:
    """Linear layers that read the same input, as one product.

    On a GPU it reads the weights where they are if they lie side by side, and a copy if not. On a CPU it reads a copy
    in oneDNN's own layout, which multiplies two to three times faster there; a row's result does not depend on the
    number of rows. `refresh` must be called after the weights have changed; oneDNN's copy is then made at the next use.
    Adapters are part of that copy; on a GPU they are products of their own, as in training, which needs no copy.
    """

    def __init__(self, *linears: nn.Linear):
        self.linears = linears
        first = linears[0].weight
        self.packed = first.device.type == "cpu" and onednn_packs(first.dtype)
        self.weight = None if self.packed else side_by_side([linear.weight for linear in linears])
        self.copied = self.weight is None
        self.bias: torch.Tensor | None = None
        self.adapters: list[tuple[int, Adapter]] = []  # with the first of the columns that each adds to
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        if self.packed:
            self.weight = None
        else:
            starts = itertools.accumulate((len(linear.weight) for linear in self.linears), initial=0)
            found = zip(starts, map(adapter_of, self.linears), strict=False)
            self.adapters = [(start, adapter) for start, adapter in found if adapter is not None]
        if self.copied and not self.packed:
            weights = [linear.weight for linear in self.linears]
            self.weight = torch.cat(weights) if self.weight is None else torch.cat(weights, out=self.weight)
        if self.linears[0].bias is not None:
            joint = torch.cat([linear.bias for linear in self.linears])
            self.bias = joint if self.bias is None else self.bias.copy_(joint)

    def __call__(self, inputs: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """(R, in) -> (R, out), and `plus` (R, out) added to it."""
        if self.packed:
            if self.weight is None:
                self.weight = self._pack()
            if plus is None:
                return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(inputs, plus, self.weight, self.bias, "add")
        if plus is None:
            outputs = F.linear(inputs, self.weight, self.bias)
        else:
            outputs = torch.addmm(plus if self.bias is None else plus + self.bias, inputs, self.weight.t())
        for start, adapter in self.adapters:
            part = outputs.narrow(1, start, len(adapter.up))
            part.addmm_(F.linear(inputs, adapter.down), adapter.up.t(), alpha=adapter.scaling)
        return outputs

    def _pack(self) -> torch.Tensor:
        weights = [effective_weight(linear) for linear in self.linears]
        joint = side_by_side(weights)
        return torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights) if joint is None else joint, PACKED_FOR)


@functools.cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this CPU multiply with packed weights, rightly: the operators are torch's own
    compiler's, and absent from some builds."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, weight, plus = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 32), (48, 32), (3, 48)))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
        product = torch.ops.mkldnn._linear_pointwise.binary(inputs, plus, packed, None, "add")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    expected = inputs.double() @ weight.double().t() + plus.double()
    return bool((product - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm())
