"""The operators of quantised torch.export graphs, as torchao's quantisation (PT2E) writes them.

Values are rounded by `quantize_per_tensor`, weights are stored as levels and taken back by `dequantize_per_channel`;
what lies between is computed in float32, and left to compilers to do on integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivet.models.foreign.assembly import Flow, refuse_unless
from trivet.models.foreign.exported_graph import Call, Operator
from trivet.models.foreign.quantized import RANGES, Dequantize, Quantize

KINDS = {1: torch.uint8, 2: torch.int8}
"""Types of levels by their numbers in the files."""


def _quantize(call: Call) -> Flow:
    """clamp(round(x / scale) + zero, low, high); the program multiplies by 1 / scale instead, rounded."""
    scale, zero = _step(call)
    low, high = _range(call)
    return call.assembly.layer(Quantize(scale, zero, low, high), call.flow("input"))


def _dequantize(call: Call) -> Flow:
    scale, zero = _step(call)
    _range(call)
    return call.assembly.layer(Dequantize(scale, zero), call.flow("input"))


def _dequantize_each(call: Call) -> Tensor:
    """Levels of weights, with a scale for each of their channels."""
    levels, scale = call.weight("input"), call.weight("scales")
    zero, axis = call.maybe("zero_points"), call.axis(call.get("axis"), levels)
    low, high = _range(call)
    kind = KINDS[call.get("dtype")]
    fits = levels.dtype == kind and low <= int(levels.min()) and int(levels.max()) <= high if levels.numel() else True
    refuse_unless(fits, f"has levels that are no {kind} from {low} to {high}")
    refuse_unless(
        scale.shape == levels.shape[axis : axis + 1] and (zero is None or zero.shape == scale.shape),
        f"has {tuple(scale.shape)} scales for an axis of {levels.shape[axis]}",
    )
    refuse_unless(scale.dtype == torch.float32 and bool((scale > 0).all()), "has scales that are not positive float32")
    shape = [1] * levels.ndim
    shape[axis] = -1
    shifted = levels.long() if zero is None else levels.long() - zero.long().view(shape)
    return shifted * scale.view(shape)


def _step(call: Call) -> tuple[Tensor, Tensor]:
    scale, zero = call.get("scale"), call.get("zero_point")
    refuse_unless(isinstance(scale, float) and 0 < scale < float("inf"), f"has the scale {scale}")
    refuse_unless(type(zero) is int, f"has the zero {zero}")
    return torch.tensor(scale), torch.tensor(float(zero))


def _range(call: Call) -> tuple[int, int]:
    kind = KINDS.get(call.get("dtype"))
    low, high = call.get("quant_min"), call.get("quant_max")
    refuse_unless(kind is not None, "rounds to another type than int8 or uint8")
    least, most = RANGES[kind] if kind is not None else (0, 0)
    refuse_unless(
        type(low) is int and type(high) is int and least <= low < high <= most, f"has levels from {low} to {high}"
    )
    return low, high


QUANTIZED: dict[str, Operator] = {
    "quantized_decomposed.quantize_per_tensor.default": _quantize,
    "quantized_decomposed.dequantize_per_tensor.default": _dequantize,
    "quantized_decomposed.dequantize_per_channel.default": _dequantize_each,
}
