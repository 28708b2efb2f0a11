"""ONNX operators rebuilt as PyTorch layers, each after the operator specification of the ONNX standard.

Covers what image classifiers are made of, in operator sets 7 to 24. An operator that is not here is refused by name:
a wrong guess would attack and certify another network than the one in the file.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivet.models.foreign.assembly import (
    Assembly,
    Flow,
    Sizes,
    Unsupported,
    Value,
    batch_norm,
    convolution,
    linear,
    refuse_unless,
    with_weights,
)


@dataclass(frozen=True)
class Step:
    """One node of the graph, with everything its operator may ask.

    Attributes:
        inputs: its values; None where an optional one is left out.
        attributes: by name; integers, floats, strings, lists or tensors.
        outputs: how many results somebody asks for.
        sole: whether this node is the only reader of each input.
        opset: version of the operator set.
        batched: whether the first axis is the batch. Networks for one vector [n] have none, and are lifted.
        declared: the batch size the file was written with, None if free.
    """

    assembly: Assembly
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    outputs: int
    sole: Sequence[bool]
    opset: int
    batched: bool
    declared: int | None

    def given(self, i: int) -> Value | None:
        return self.inputs[i] if i < len(self.inputs) else None

    def value(self, i: int = 0) -> Flow | Tensor:
        value = self.given(i)
        if not isinstance(value, (Flow, Tensor)):
            raise Unsupported("computes with the sizes of its input")
        return value

    def flow(self, i: int = 0) -> Flow:
        value = self.value(i)
        if isinstance(value, Tensor):
            raise Unsupported("is applied to a constant")
        return value

    def constant(self, i: int) -> Tensor | None:
        value = self.given(i)
        if isinstance(value, (Flow, Sizes)):
            raise Unsupported(f"takes its argument {i} from the data; only constants are supported there")
        return value

    def weight(self, i: int) -> Tensor:
        value = self.constant(i)
        if value is None:
            raise Unsupported(f"lacks its argument {i}")
        return value

    def ints(self, name: str, i: int | None = None) -> list[int] | None:
        """A list of integers, an attribute in old operator sets and input `i` in newer ones."""
        value = self.attributes.get(name)
        if value is None and i is not None:
            tensor = self.constant(i)
            value = None if tensor is None else tensor.flatten().tolist()
        return None if value is None else [int(each) for each in value]

    def rank(self, value: Value) -> int:
        """The number of axes the graph believes `value` to have."""
        return len(value.shape) + self.batched if isinstance(value, Flow) else value.ndim  # type: ignore[union-attr]

    def axis(self, axis: int, value: Flow | Tensor, rank: int | None = None) -> int:
        """The axis of our value for an axis of the graph's value."""
        rank = self.rank(value) if rank is None else rank
        axis = axis + rank if axis < 0 else axis
        refuse_unless(0 <= axis < rank, f"works on axis {axis} of a value with {rank}")
        if isinstance(value, Tensor):
            return axis
        refuse_unless(axis >= self.batched, "works along the batch, which would mix its records")
        return axis + 1 - self.batched


def _window(step: Step, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and the padding before and after each pixel axis."""
    spatial = len(kernel)
    stride = step.attributes.get("strides") or [1] * spatial
    dilation = step.attributes.get("dilations") or [1] * spatial
    pads = step.attributes.get("pads") or [0] * 2 * spatial
    refuse_unless(
        len(stride) == len(dilation) == spatial and len(pads) == 2 * spatial, "has attributes of different lengths"
    )
    refuse_unless(min(*stride, *dilation, *kernel) >= 1, "has a stride, dilation or kernel below 1")
    auto = step.attributes.get("auto_pad") or "NOTSET"
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
            for size, s, k, d in zip(step.flow().shape[1:], stride, kernel, dilation, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return stride, dilation, *((less, more) if auto == "SAME_UPPER" else (more, less))
    refuse_unless(auto in ("NOTSET", "VALID"), f"has auto_pad={auto!r}")
    pads = [0] * 2 * spatial if auto == "VALID" else pads
    return stride, dilation, pads[:spatial], pads[spatial:]


def _pad(step: Step, value: Flow, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Flow:
    """Pad the last axes; PyTorch counts them from the last."""
    amounts = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return step.assembly.call(F.pad, value, amounts, "constant", fill) if any(amounts) else value


def _conv(step: Step) -> Flow:
    x, weight = step.flow(), step.weight(1)
    stride, dilation, before, after = _window(step, weight.shape[2:])
    if before != after:
        x, before = _pad(step, x, before, after), [0] * len(before)
    groups = step.attributes.get("group", 1)
    layer = convolution(weight, step.constant(2), stride, before, dilation, groups)
    return step.assembly.layer(layer, x)


def _max_pool(step: Step) -> Flow:
    x, kernel = step.flow(), step.ints("kernel_shape") or []
    layers = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
    refuse_unless(step.outputs == 1 and len(kernel) in layers, "asks for the positions of the maxima")
    stride, dilation, before, after = _window(step, kernel)
    if before != after or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        x, before = _pad(step, x, before, after, -math.inf), [0] * len(kernel)
    ceil = bool(step.attributes.get("ceil_mode", 0))
    layer = layers[len(kernel)](tuple(kernel), tuple(stride), tuple(before), tuple(dilation), ceil_mode=ceil)
    return step.assembly.layer(layer, x)


def _average_pool(step: Step) -> Flow:
    x, kernel = step.flow(), step.ints("kernel_shape") or []
    layers = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    stride, dilation, before, after = _window(step, kernel)
    ceil, counted = bool(step.attributes.get("ceil_mode", 0)), bool(step.attributes.get("count_include_pad", 0))
    refuse_unless(len(kernel) in layers and set(dilation) == {1}, "averages over a dilated window")
    if before != after:
        refuse_unless(counted and not ceil, "pads one side more than the other without counting the padding")
        x, before = _pad(step, x, before, after), [0] * len(kernel)
    layer: Callable[..., nn.Module] = layers[len(kernel)]
    return step.assembly.layer(layer(tuple(kernel), tuple(stride), tuple(before), ceil, counted), x)


def _gemm(step: Step) -> Flow:
    x, weight, bias = step.flow(), step.weight(1), step.constant(2)
    refuse_unless(not step.attributes.get("transA", 0), "transposes the data")
    refuse_unless(len(x.shape) == 1, "multiplies values that are not rows")
    weight = weight if step.attributes.get("transB", 0) else weight.T
    weight = step.attributes.get("alpha", 1.0) * weight
    if bias is not None:
        refuse_unless(bias.numel() in (1, len(weight)), "adds another row to each record of a batch")
        bias = (step.attributes.get("beta", 1.0) * bias).reshape(-1).expand(len(weight))
    return step.assembly.layer(linear(weight, bias), x)


def _matmul(step: Step) -> Flow | Tensor:
    a, b = step.value(0), step.value(1)
    if isinstance(b, Tensor) and b.ndim == 2 and isinstance(a, Flow):
        return step.assembly.layer(linear(b.T, None), a)
    if isinstance(a, Tensor) and a.ndim == 2 and not step.batched and isinstance(b, Flow) and len(b.shape) == 1:
        return step.assembly.layer(linear(a, None), b)
    refuse_unless(all(isinstance(v, Tensor) or len(v.shape) >= 2 for v in (a, b)), "multiplies vectors of the data")
    return step.assembly.apply(torch.matmul, a, b)


def _add(step: Step) -> Flow | Tensor:
    a, b = step.value(0), step.value(1)
    for (flow, bias), sole in (((a, b), step.sole[0]), ((b, a), step.sole[1])):
        if sole and isinstance(flow, Flow) and isinstance(bias, Tensor) and _becomes_bias(step.assembly, flow, bias):
            return flow
    return step.assembly.combine(operator.add, a, b)


def _becomes_bias(assembly: Assembly, flow: Flow, bias: Tensor) -> bool:
    """MatMul and Add are how many tools write a linear layer; as one layer it bounds more tightly and runs faster."""
    if flow.node.op != "call_module":
        return False
    layer = assembly.root.get_submodule(str(flow.node.target))
    if not isinstance(layer, nn.Linear) or "bias" in layer.state_dict() or bias.shape[-1:] != (layer.out_features,):
        return False
    if bias.numel() != layer.out_features or bias.dtype != torch.float32:
        return False
    layer.bias = nn.Parameter(bias.reshape(-1).clone())
    return True


def _div(step: Step) -> Flow | Tensor:
    a, b = step.value(0), step.value(1)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_floating_point():
        return step.assembly.apply(torch.div, a, b, rounding_mode="trunc")
    return step.assembly.combine(operator.truediv, a, b)


def _combined(function: Callable[..., Any]) -> Callable[[Step], Value]:
    return lambda step: step.assembly.combine(function, step.value(0), step.value(1))


def _activation(make: Callable[[Mapping[str, Any]], nn.Module]) -> Callable[[Step], Value]:
    return lambda step: step.assembly.layer(make(step.attributes), step.flow())


def _softmax(kind: type[nn.Softmax] | type[nn.LogSoftmax]) -> Callable[[Step], Value]:
    def build(step: Step) -> Flow:
        x = step.flow()
        axis = step.axis(step.attributes.get("axis", 1 if step.opset < 13 else -1), x)
        # Before operator set 13 the axis meant "from here to the end, as one".
        refuse_unless(step.opset >= 13 or axis == len(x.shape), "normalises over several axes at once")
        return step.assembly.layer(kind(axis), x)

    return build


def _bound(step: Step, name: str, i: int) -> float | None:
    tensor = step.constant(i)
    return step.attributes.get(name) if tensor is None else float(tensor)


def _clip(step: Step) -> Flow:
    x, low, high = step.flow(), _bound(step, "min", 1), _bound(step, "max", 2)
    if low is None and high is None:
        return x
    if low == 0 and high is None:
        return step.assembly.layer(nn.ReLU(), x)
    if low is not None and high is not None and low < high:
        return step.assembly.layer(nn.Hardtanh(low, high), x)
    return step.assembly.call(torch.clamp, x, low, high)


def _batch_normalization(step: Step) -> Flow:
    refuse_unless(not step.attributes.get("training_mode", 0) and step.outputs == 1, "is in training mode")
    weight, bias, mean, variance = (step.weight(i) for i in (1, 2, 3, 4))
    x = step.flow()
    layer = batch_norm(x.stand_in.ndim, mean, variance, weight, bias, step.attributes.get("epsilon", 1e-5))
    return step.assembly.layer(layer, x)


def _instance_normalization(step: Step) -> Flow:
    layers = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    x, weight = step.flow(), step.weight(1)
    spatial = len(x.shape) - 1
    refuse_unless(spatial in layers, f"normalises over {spatial} axes")
    layer = layers[spatial](len(weight), eps=step.attributes.get("epsilon", 1e-5), affine=True)
    return step.assembly.layer(with_weights(layer, weight=weight, bias=step.weight(2)), x)


def _group_normalization(step: Step) -> Flow:
    groups, weight, bias = int(step.attributes["num_groups"]), step.weight(1), step.weight(2)
    if step.opset < 21:  # one factor for each group then, one for each channel now
        each = step.flow().shape[0] // groups
        weight, bias = weight.repeat_interleave(each), bias.repeat_interleave(each)
    layer = nn.GroupNorm(groups, len(weight), eps=step.attributes.get("epsilon", 1e-5))
    return step.assembly.layer(with_weights(layer, weight=weight, bias=bias), step.flow())


def _reduce_mean(step: Step) -> Flow:
    x, axes = step.flow(), step.ints("axes", 1)
    if not axes and step.attributes.get("noop_with_empty_axes", 0):
        return x
    axes = [step.axis(a, x) for a in axes or range(step.batched, step.rank(x))]
    return step.assembly.mean(x, axes, bool(step.attributes.get("keepdims", 1)))


def _global_average_pool(step: Step) -> Flow:
    x = step.flow()
    return step.assembly.mean(x, range(2, x.stand_in.ndim), keep=True)


def _pad_operator(step: Step) -> Flow:
    x, pads = step.flow(), step.ints("pads", 1) or []
    mode = step.attributes.get("mode", "constant")
    refuse_unless(mode == "constant" and step.constant(3) is None, f"pads some axes only, or with mode {mode!r}")
    rank, fill = step.rank(x), step.constant(2)
    refuse_unless(len(pads) == 2 * rank, "pads another number of axes than it has")
    refuse_unless(not step.batched or pads[0] == pads[rank] == 0, "pads the batch")
    value = float(fill) if fill is not None else float(step.attributes.get("value", 0.0))
    return _pad(step, x, pads[step.batched : rank], pads[rank + step.batched :], value)


Operator = Callable[[Step], Value]

ARITHMETIC: dict[str, Operator] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Clip": _clip,
    "Conv": _conv,
    "Div": _div,
    "Elu": _activation(lambda a: nn.ELU(a.get("alpha", 1.0))),
    "Gelu": _activation(lambda a: nn.GELU(a.get("approximate", "none"))),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LeakyRelu": _activation(lambda a: nn.LeakyReLU(a.get("alpha", 0.01))),
    "LogSoftmax": _softmax(nn.LogSoftmax),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _combined(operator.mul),
    "Neg": lambda step: step.assembly.apply(torch.neg, step.value()),
    "Pad": _pad_operator,
    "ReduceMean": _reduce_mean,
    "Relu": _activation(lambda _: nn.ReLU()),
    "Sigmoid": _activation(lambda _: nn.Sigmoid()),
    "Softmax": _softmax(nn.Softmax),
    "Softplus": _activation(lambda _: nn.Softplus()),
    "Sqrt": lambda step: step.assembly.apply(torch.sqrt, step.value()),
    "Sub": _combined(operator.sub),
    "Tanh": _activation(lambda _: nn.Tanh()),
}
