"""ATen operators of a torch.export graph rebuilt as PyTorch layers: both as exported and after decomposition.

An operator that is not here is refused by name. The list is also what makes a foreign file harmless: nothing else is
ever looked up or called.
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
    record_shape,
    refuse_unless,
    with_weights,
    without_batch,
)

FLOAT = 7
"""The number of float32 in the files of torch.export."""


@dataclass(frozen=True)
class Call:
    """One node: its arguments by the names of the operator's schema, and the batch size of the file (None: free)."""

    assembly: Assembly
    arguments: Mapping[str, Any]
    declared: int | None

    def get(self, name: str, default: Any = None) -> Any:
        value = self.arguments.get(name)
        return default if value is None else value

    def value(self, name: str = "self") -> Flow | Tensor:
        value = self.arguments.get(name)
        if not isinstance(value, (Flow, Tensor)):
            raise Unsupported(f"has no tensor for its argument {name}")
        return value

    def flow(self, name: str = "self") -> Flow:
        value = self.value(name)
        if isinstance(value, Tensor):
            raise Unsupported("is applied to a constant")
        return value

    def weight(self, name: str) -> Tensor:
        value = self.value(name)
        if isinstance(value, Flow):
            raise Unsupported(f"takes its argument {name} from the data; only constants are supported there")
        return value

    def maybe(self, name: str) -> Tensor | None:
        return None if self.arguments.get(name) is None else self.weight(name)

    def ints(self, name: str, length: int, default: int) -> list[int]:
        """A list of `length` integers, which may be given as one."""
        value = self.get(name) or [default]
        value = [value] if isinstance(value, int) else value
        return list(value) * (length if len(value) == 1 else 1)

    def axis(self, axis: int, value: Flow | Tensor, extra: int = 0) -> int:
        """`axis` counted from the front; the batch is refused."""
        rank = (value.stand_in.ndim if isinstance(value, Flow) else value.ndim) + extra
        refuse_unless(-rank <= axis < rank, f"works on axis {axis} of a value with {rank}")
        axis %= rank
        refuse_unless(isinstance(value, Tensor) or axis > 0, "works along the batch, which would mix its records")
        return axis


def _conv(call: Call) -> Flow:
    weight = call.weight("weight")
    spatial = weight.ndim - 2
    refuse_unless(not call.get("transposed", False), "is a transposed convolution")
    padding = call.get("padding")
    padding = padding if isinstance(padding, str) else call.ints("padding", spatial, 0)
    stride, dilation = call.ints("stride", spatial, 1), call.ints("dilation", spatial, 1)
    layer = convolution(weight, call.maybe("bias"), stride, padding, dilation, call.get("groups", 1))
    return call.assembly.layer(layer, call.flow("input"))


def _matmul(a: str, b: str) -> Callable[[Call], Value]:
    def build(call: Call) -> Flow | Tensor:
        x, y = call.value(a), call.value(b)
        if isinstance(x, Flow) and isinstance(y, Tensor) and y.ndim == 2:
            return call.assembly.layer(linear(y.T, None), x)
        refuse_unless(all(isinstance(v, Tensor) or len(v.shape) >= 2 for v in (x, y)), "multiplies vectors of the data")
        return call.assembly.apply(torch.matmul, x, y)

    return build


def _addmm(call: Call) -> Flow:
    refuse_unless(call.get("alpha", 1) == call.get("beta", 1) == 1, "scales its terms")
    weight, bias = call.weight("mat2"), call.weight("self")
    refuse_unless(bias.numel() == weight.shape[1], "adds another row to each record of a batch")
    return call.assembly.layer(linear(weight.T, bias.reshape(-1)), call.flow("mat1"))


def _batch_norm(call: Call) -> Flow:
    refuse_unless(not call.get("training", False), "is in training mode; export it in eval mode")
    x, mean, variance = call.flow("input"), call.weight("running_mean"), call.weight("running_var")
    weight, bias = call.maybe("weight"), call.maybe("bias")
    return call.assembly.layer(batch_norm(x.stand_in.ndim, mean, variance, weight, bias, call.get("eps", 1e-5)), x)


def _group_norm(groups: str) -> Callable[[Call], Value]:
    def build(call: Call) -> Flow:
        x, weight, bias = call.flow("input"), call.maybe("weight"), call.maybe("bias")
        layer = nn.GroupNorm(call.get(groups), x.shape[0], eps=call.get("eps", 1e-5))
        return call.assembly.layer(with_weights(layer, weight=weight, bias=bias), x)

    return build


def _max_pool(spatial: int, kind: Callable[..., nn.Module]) -> Callable[[Call], Value]:
    def build(call: Call) -> Flow:
        kernel = call.ints("kernel_size", spatial, 1)
        stride = call.ints("stride", spatial, 1) if call.get("stride") else kernel
        padding, dilation = call.ints("padding", spatial, 0), call.ints("dilation", spatial, 1)
        sizes = (tuple(each) for each in (kernel, stride, padding, dilation))
        return call.assembly.layer(kind(*sizes, ceil_mode=call.get("ceil_mode", False)), call.flow())

    return build


def _avg_pool(spatial: int, kind: Callable[..., nn.Module]) -> Callable[[Call], Value]:
    def build(call: Call) -> Flow:
        refuse_unless(call.get("divisor_override") is None, "divides by a number of its own")
        kernel = call.ints("kernel_size", spatial, 1)
        stride = call.ints("stride", spatial, 1) if call.get("stride") else kernel
        sizes = (tuple(each) for each in (kernel, stride, call.ints("padding", spatial, 0)))
        layer = kind(*sizes, call.get("ceil_mode", False), call.get("count_include_pad", True))
        return call.assembly.layer(layer, call.flow())

    return build


def _adaptive_avg_pool(spatial: int, kind: Callable[..., nn.Module]) -> Callable[[Call], Value]:
    return lambda call: call.assembly.layer(kind(tuple(call.ints("output_size", spatial, 1))), call.flow())


def _mean(call: Call) -> Flow:
    x = call.flow()
    axes = [call.axis(a, x) for a in call.get("dim") or range(1, x.stand_in.ndim)]
    return call.assembly.mean(x, axes, call.get("keepdim", False))


def _flatten(call: Call) -> Flow | Tensor:
    x = call.value()
    first, last = (call.axis(call.get(name, default), x) for name, default in (("start_dim", 0), ("end_dim", -1)))
    if isinstance(x, Tensor):
        return x.flatten(first, last)
    sizes = x.shape
    return call.assembly.reshape(x, [*sizes[: first - 1], math.prod(sizes[first - 1 : last]), *sizes[last:]])


def _view(name: str) -> Callable[[Call], Value]:
    def build(call: Call) -> Flow | Tensor:
        x = call.value()
        wanted = [None if isinstance(n, Sizes) else int(n) for n in call.get(name)]
        if isinstance(x, Tensor):
            refuse_unless(None not in wanted, "spreads a constant over the batch")
            return x.reshape([n for n in wanted if n is not None])
        return call.assembly.reshape(x, record_shape(without_batch(wanted, call.declared), math.prod(x.shape)))

    return build


def _expand(call: Call) -> Flow:
    x, wanted = call.flow(), [None if isinstance(n, Sizes) else int(n) for n in call.get("size")]
    sizes = without_batch(wanted, call.declared)
    same = len(sizes) == len(x.shape) and all(n in (-1, own) for n, own in zip(sizes, x.shape, strict=True))
    refuse_unless(same, "repeats values")
    return x


def _permute(call: Call) -> Flow | Tensor:
    x, order = call.value(), call.get("dims")
    if isinstance(x, Tensor):
        return x.permute(order)
    refuse_unless(order[0] == 0, "moves the batch away from the first axis")
    return call.assembly.call(torch.permute, x, [0, *(call.axis(a, x) for a in order[1:])])


def _transpose(call: Call) -> Flow | Tensor:
    x = call.value()
    return call.assembly.apply(torch.transpose, x, call.axis(call.get("dim0", 0), x), call.axis(call.get("dim1", 1), x))


def _squeeze(call: Call) -> Flow | Tensor:
    x, axes = call.value(), call.get("dim", [])
    drop = {call.axis(a, x) for a in ([axes] if isinstance(axes, int) else axes)}
    if isinstance(x, Tensor):
        return x.squeeze(tuple(drop))
    return call.assembly.reshape(x, [size for i, size in enumerate(x.shape, 1) if i not in drop or size != 1])


def _unsqueeze(call: Call) -> Flow | Tensor:
    x = call.value()
    axis = call.axis(call.get("dim"), x, extra=1)
    if isinstance(x, Tensor):
        return x.unsqueeze(axis)
    return call.assembly.reshape(x, [*x.shape[: axis - 1], 1, *x.shape[axis - 1 :]])


def _slice(call: Call) -> Flow | Tensor:
    x = call.value()
    axis, end = call.get("dim", 0), call.get("end")
    part = slice(call.get("start"), end, call.get("step", 1))
    if isinstance(x, Flow) and axis == 0 and not part.start and (end is None or end >= 2**62) and part.step == 1:
        return x
    axis = call.axis(axis, x)
    return x[(*[slice(None)] * axis, part)] if isinstance(x, Tensor) else call.assembly.pick(x, axis, part)


def _select(call: Call) -> Flow | Tensor:
    x = call.value()
    axis, index = call.axis(call.get("dim"), x), call.get("index")
    return x.select(axis, index) if isinstance(x, Tensor) else call.assembly.pick(x, axis, index)


def _cat(call: Call) -> Flow | Tensor:
    values: Sequence[Flow | Tensor] = call.get("tensors")
    refuse_unless(len({isinstance(value, Flow) for value in values}) == 1, "joins constants and data")
    return call.assembly.apply(torch.cat, values, call.axis(call.get("dim", 0), values[0]))


def _size(call: Call) -> Value:
    x, axis = call.value(), call.get("dim")
    if isinstance(x, Flow):
        axis %= x.stand_in.ndim
        return Sizes((None,)) if axis == 0 else Sizes((x.shape[axis - 1],))
    return Sizes((x.shape[axis],))


def _arithmetic(function: Callable[..., Any]) -> Callable[[Call], Value]:
    def build(call: Call) -> Flow | Tensor:
        x, other = call.value(), call.get("other")
        refuse_unless(isinstance(other, (Flow, Tensor, int, float)), "computes with the sizes of its input")
        refuse_unless(call.get("alpha", 1) == 1, "scales what it adds")
        return call.assembly.combine(function, x, other)

    return build


def _unary(function: Callable[..., Any]) -> Callable[[Call], Value]:
    return lambda call: call.assembly.apply(function, call.value())


def _clamp(call: Call) -> Flow:
    x, low, high = call.flow(), call.get("min"), call.get("max")
    if low == 0 and high is None:
        return call.assembly.layer(nn.ReLU(), x)
    if low is not None and high is not None and low < high:
        return call.assembly.layer(nn.Hardtanh(low, high), x)
    return call.assembly.call(torch.clamp, x, low, high)


def _pad(call: Call) -> Flow:
    x, amounts, mode = call.flow(), call.get("pad"), call.get("mode", "constant")
    refuse_unless(len(amounts) <= 2 * len(x.shape) and mode == "constant", f"pads the batch, or with mode {mode!r}")
    return call.assembly.call(F.pad, x, list(amounts), "constant", float(call.get("value", 0.0)))


def _identity(call: Call) -> Value:
    training = call.get("train", False)
    refuse_unless(not training, "is in training mode; export it in eval mode")
    refuse_unless(call.get("dtype", FLOAT) == FLOAT, "casts to another type than float32")
    return call.value("input") if "input" in call.arguments else call.value()


def passes_on(operator: Operator) -> bool:
    """Whether an operator's result is its argument, in networks in eval mode."""
    return operator is _identity


def _activation(make: Callable[[Call], nn.Module]) -> Callable[[Call], Value]:
    return lambda call: call.assembly.layer(make(call), call.flow())


def _softmax(kind: type[nn.Softmax] | type[nn.LogSoftmax]) -> Callable[[Call], Value]:
    return _activation(lambda call: kind(call.axis(call.get("dim"), call.flow())))


Operator = Callable[[Call], Value]

OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(("conv1d.default", "conv2d.default", "conv3d.default", "convolution.default"), _conv),
    **dict.fromkeys(("conv1d.padding", "conv2d.padding", "conv3d.padding"), _conv),
    "linear.default": lambda call: call.assembly.layer(
        linear(call.weight("weight"), call.maybe("bias")), call.flow("input")
    ),
    "addmm.default": _addmm,
    "mm.default": _matmul("self", "mat2"),
    "bmm.default": _matmul("self", "mat2"),
    "matmul.default": _matmul("self", "other"),
    "batch_norm.default": _batch_norm,
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "group_norm.default": _group_norm("num_groups"),
    "native_group_norm.default": _group_norm("group"),
    "max_pool1d.default": _max_pool(1, nn.MaxPool1d),
    "max_pool2d.default": _max_pool(2, nn.MaxPool2d),
    "max_pool2d_with_indices.default": _max_pool(2, nn.MaxPool2d),
    "max_pool3d.default": _max_pool(3, nn.MaxPool3d),
    "avg_pool1d.default": _avg_pool(1, nn.AvgPool1d),
    "avg_pool2d.default": _avg_pool(2, nn.AvgPool2d),
    "avg_pool3d.default": _avg_pool(3, nn.AvgPool3d),
    "adaptive_avg_pool1d.default": _adaptive_avg_pool(1, nn.AdaptiveAvgPool1d),
    "adaptive_avg_pool2d.default": _adaptive_avg_pool(2, nn.AdaptiveAvgPool2d),
    "_adaptive_avg_pool2d.default": _adaptive_avg_pool(2, nn.AdaptiveAvgPool2d),
    "mean.dim": _mean,
    "relu.default": _activation(lambda _: nn.ReLU()),
    "leaky_relu.default": _activation(lambda call: nn.LeakyReLU(call.get("negative_slope", 0.01))),
    "elu.default": _activation(lambda call: nn.ELU(call.get("alpha", 1.0))),
    "gelu.default": _activation(lambda call: nn.GELU(call.get("approximate", "none"))),
    "hardtanh.default": _activation(lambda call: nn.Hardtanh(call.get("min_val", -1.0), call.get("max_val", 1.0))),
    "relu6.default": _activation(lambda _: nn.ReLU6()),
    "sigmoid.default": _activation(lambda _: nn.Sigmoid()),
    "silu.default": _activation(lambda _: nn.SiLU()),
    "softplus.default": _activation(lambda call: nn.Softplus(call.get("beta", 1.0), call.get("threshold", 20.0))),
    "tanh.default": _activation(lambda _: nn.Tanh()),
    "softmax.int": _softmax(nn.Softmax),
    "_softmax.default": _softmax(nn.Softmax),
    "log_softmax.int": _softmax(nn.LogSoftmax),
    "_log_softmax.default": _softmax(nn.LogSoftmax),
    "clamp.default": _clamp,
    "clamp_min.default": _clamp,
    "add.Tensor": _arithmetic(operator.add),
    "sub.Tensor": _arithmetic(operator.sub),
    "mul.Tensor": _arithmetic(operator.mul),
    "div.Tensor": _arithmetic(operator.truediv),
    "abs.default": _unary(torch.abs),
    "exp.default": _unary(torch.exp),
    "log.default": _unary(torch.log),
    "neg.default": _unary(torch.neg),
    "sqrt.default": _unary(torch.sqrt),
    "constant_pad_nd.default": _pad,
    "pad.default": _pad,
    "sym_size.int": _size,
}

VIEWS: dict[str, Operator] = {
    "flatten.using_ints": _flatten,
    "view.default": _view("size"),
    "_unsafe_view.default": _view("size"),
    "reshape.default": _view("shape"),
    "expand.default": _expand,
    "permute.default": _permute,
    "transpose.int": _transpose,
    "t.default": lambda call: call.assembly.apply(torch.t, call.weight("self")),
    "squeeze.dim": _squeeze,
    "squeeze.dims": _squeeze,
    "unsqueeze.default": _unsqueeze,
    "slice.Tensor": _slice,
    "select.int": _select,
    "cat.default": _cat,
    **dict.fromkeys(
        (
            "alias.default",
            "clone.default",
            "contiguous.default",
            "detach.default",
            "detach_.default",
            "dropout.default",
            "lift_fresh.default",
            "lift_fresh_copy.default",
            "to.dtype",
            "_to_copy.default",
        ),
        _identity,
    ),
}
"""Operators whose result may share memory with their argument (or is the same value here)."""
