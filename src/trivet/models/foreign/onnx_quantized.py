"""QuantizeLinear and DequantizeLinear, which stand around every value of a quantised ONNX file (QDQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from trivet.models.foreign.assembly import Flow, refuse_unless
from trivet.models.foreign.onnx_graph import Operator, Step
from trivet.models.foreign.quantized import RANGES, Dequantize, Quantize


def _quantize(step: Step) -> Flow:
    scale, zero, kind = _levels(step, torch.uint8)
    refuse_unless(kind in RANGES, f"rounds to {kind}, where int8 or uint8 is supported")
    return step.assembly.layer(Quantize(scale, zero, *RANGES[kind]), step.flow())


def _dequantize(step: Step) -> Flow | Tensor:
    x = step.value()
    scale, zero, _ = _levels(step, torch.uint8)
    layer = Dequantize(scale, zero)
    return step.assembly.layer(layer, x) if isinstance(x, Flow) else layer(x.to(torch.float64)).float()


def _levels(step: Step, default: torch.dtype) -> tuple[Tensor, Tensor, torch.dtype]:
    """Scale and zero, shaped to fit the value, and the type of the levels."""
    refuse_unless(not step.attributes.get("block_size", 0), "quantises by blocks")
    x, scale, zero = step.value(), step.weight(1), step.constant(2)
    kind = default if zero is None else zero.dtype
    zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
    refuse_unless(scale.dtype == torch.float32 and bool((scale > 0).all()), "has scales that are not positive float32")
    refuse_unless(scale.shape == zero.shape and scale.ndim <= 1, "has scales and zeros of different shapes")
    if scale.numel() == 1:
        return scale.reshape(()), zero.reshape(()), kind
    axis = step.axis(step.attributes.get("axis", 1), x)
    sizes = x.stand_in.shape if isinstance(x, Flow) else x.shape
    refuse_unless(sizes[axis] == len(scale), f"has {len(scale)} scales for an axis of {sizes[axis]}")
    shape = [1] * len(sizes)
    shape[axis] = len(scale)
    return scale.reshape(shape), zero.reshape(shape), kind


QUANTIZED: dict[str, Operator] = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}
