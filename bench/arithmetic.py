"""What a step calculates, and what this CPU makes of that at best."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcorl.rollout.linear import JointLinear, onednn_packs

SIDE = 1024  # of the product that the rate is measured on
SAMPLES = 5


def counted(call):
    """Floating-point operations of the products, convolutions and attention of `call`, as torch counts them."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call()
    return counter.get_total_flops()


def product_rate():
    """FLOP/s in float32 of the fastest large product: torch's, or one with weights in oneDNN's layout."""
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    product = torch.empty(SIDE, SIDE)
    joint = JointLinear(torch.nn.Linear(SIDE, SIDE, bias=False))
    calls = [lambda: torch.mm(left, right, out=product), lambda: joint(left)]
    with torch.inference_mode():
        return 2 * SIDE**3 / min(_seconds(call) for call in calls for _ in range(SAMPLES))


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _formulas():
    """Of what torch's counter does not know: attention on a CPU and, where it is built in, oneDNN's linear layers."""
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    if onednn_packs(torch.float32):
        linear = torch.ops.mkldnn._linear_pointwise
        formulas |= {linear: _linear, linear.binary: _linear}
    return formulas


def _linear(inputs, *_, out_shape, **__):
    return 2 * inputs[-1] * out_shape.numel()


def _attention(query, key, *_, **__):
    return 4 * query.numel() * key[-2]


def _attention_backward(_gradient, query, key, *_, **__):
    """Five products of that size, since the scores are computed again."""
    return 10 * query.numel() * key[-2]
