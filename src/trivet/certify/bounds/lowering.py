"""Which bounds each kind of PyTorch layer and function has. What is not here is refused, never skipped."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.certify.bounds.activations import Monotone, Rectifier, sigmoid, tanh
from trivet.certify.bounds.affine import Convolution, Linear
from trivet.certify.bounds.moving import Concatenation, Padding, Scale, Sum
from trivet.certify.bounds.pooling import MaxPool
from trivet.certify.bounds.steps import PROBES, Builder, Constant, Flow, Reader, refuse_unless
from trivet.models.normalize import Normalize

_MEAN_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * length


# Layers


def _linear(build: Builder, module: nn.Linear, x: Flow) -> Flow:
    return build.add(lambda read: Linear(read(module.weight), read.optional(module.bias)), x)


def _convolution(build: Builder, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Flow) -> Flow:
    before = list(module._reversed_padding_repeated_twice)
    padding: tuple[int, ...] = _tuple(0, len(module.kernel_size))
    if module.padding_mode != "zeros":
        mode = module.padding_mode
        x = build.move(lambda value: F.pad(value, before, mode), x)
    elif before[::2] == before[1::2]:
        padding = tuple(reversed(before[::2]))
    else:
        x = build.move(lambda value: F.pad(value, before), x)

    def make(read: Reader) -> Convolution:
        weight, bias = read(module.weight), read.optional(module.bias)
        return Convolution(weight, bias, module.stride, padding, module.dilation, module.groups)

    return build.add(make, x)


def _batch_norm(build: Builder, module: nn.modules.batchnorm._BatchNorm, x: Flow) -> Flow:
    refuse_unless(
        module.track_running_stats and module.running_mean is not None,
        "BatchNorm without running statistics mixes the records of a batch; give it some",
    )

    def make(read: Reader) -> Scale:
        mean, variance = read.statistics(module)
        factor = (variance + module.eps).rsqrt()
        if module.affine:
            factor = factor * read(module.weight)
        shift = -mean * factor
        size = (mean * factor).abs() if read.exact else None
        if module.affine:
            shift = shift + read(module.bias)
            size = None if size is None else size + read(module.bias).abs()
        shape = (-1, *[1] * (x.rank - 1))
        # x - mean, the sum under the root, the root, its inverse, two products and a sum, in any arrangement.
        return Scale(factor.view(shape), shift.view(shape), None if size is None else size.view(shape), 12)

    return build.add(make, x)


def _normalize(build: Builder, module: Normalize, x: Flow) -> Flow:
    def make(read: Reader) -> Scale:
        mean, std = read(module.mean), read(module.std)
        return Scale(1 / std, -mean / std, rounded=3)

    return build.add(make, x)


def _max_pool(build: Builder, module: nn.MaxPool2d, x: Flow) -> Flow:
    return _max_pool2d(
        build, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
        module.return_indices,
    )  # fmt: skip


def _flatten(build: Builder, module: nn.Flatten, x: Flow) -> Flow:
    return build.reshape(x, lambda value: value.flatten(module.start_dim, module.end_dim))


def _unflatten(build: Builder, module: nn.Unflatten, x: Flow) -> Flow:
    return build.reshape(x, module)


def _pool(build: Builder, module: nn.Module, x: Flow) -> Flow:
    return build.average(module, x, math.prod(_tuple(module.kernel_size, x.rank - 1)))


def _adaptive_pool(build: Builder, module: nn.Module, x: Flow) -> Flow:
    return build.average(module, x, math.prod(build.shape(x)))


def _leaky(build: Builder, module: nn.LeakyReLU, x: Flow) -> Flow:
    return build.add(lambda _: Rectifier(float(module.negative_slope)), x)


def _elu(build: Builder, module: nn.ELU, x: Flow) -> Flow:
    refuse_unless(0 <= module.alpha <= 1, f"ELU with alpha={module.alpha} has no bounds here; they need [0, 1]")
    return build.add(lambda _: Monotone(lambda t: F.elu(t, module.alpha)), x)


def _constant_pad(build: Builder, module: Any, x: Flow) -> Flow:
    return pad(build, x, list(module.padding), "constant", float(module.value))


def _same(_build: Builder, _module: nn.Module, x: Flow) -> Flow:
    return x


def _dropout(_build: Builder, _module: nn.Module, x: Flow) -> Flow:
    return x  # models are traced in eval mode


MODULES: dict[type[nn.Module], Callable[..., Flow]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    Normalize: _normalize,
    nn.MaxPool2d: _max_pool,
    **dict.fromkeys(_MEAN_POOLS, _pool),
    **dict.fromkeys(_ADAPTIVE_POOLS, _adaptive_pool),
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.ZeroPad2d: _constant_pad,
    nn.ConstantPad1d: _constant_pad,
    nn.ConstantPad2d: _constant_pad,
    nn.Identity: _same,
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.Dropout3d: _dropout,
    nn.AlphaDropout: _dropout,
    nn.ReLU: lambda build, _module, x: build.add(lambda _: Rectifier(), x),
    nn.LeakyReLU: _leaky,
    nn.ELU: _elu,
    nn.Sigmoid: lambda build, _module, x: build.add(lambda _: sigmoid(), x),
    nn.Tanh: lambda build, _module, x: build.add(lambda _: tanh(), x),
    nn.ReLU6: lambda build, _module, x: build.add(lambda _: Monotone(F.relu6), x),
    nn.Hardtanh: lambda build, module, x: build.add(lambda _: Monotone(module), x),
    nn.Softplus: lambda build, module, x: build.add(lambda _: Monotone(module), x),
}


# Functions


def _add(build: Builder, a: Any, b: Any, *, alpha: float = 1.0) -> Flow:
    refuse_unless(alpha == 1, "adds with a factor")
    return _sum(build, a, b, 1)


def _subtract(build: Builder, a: Any, b: Any, *, alpha: float = 1.0) -> Flow:
    refuse_unless(alpha == 1, "subtracts with a factor")
    return _sum(build, a, b, -1)


def _sum(build: Builder, a: Any, b: Any, sign: int) -> Flow:
    """a + sign b, of which at least one depends on the input."""
    if isinstance(a, Flow) and isinstance(b, Flow):
        refuse_unless(build.shape(a) == build.shape(b), f"adds values of {build.shape(a)} and {build.shape(b)}")
        return build.add(lambda _: Sum((1, sign)), a, b)
    x, constant = (a, b) if isinstance(a, Flow) else (b, a)
    own = 1.0 if x is a else float(sign)
    other = float(sign) if x is a else 1.0

    def make(read: Reader) -> Scale:
        shift = build.beside(x, read, constant)
        return Scale(torch.full_like(shift, own), other * shift, rounded=1)

    return build.keeping_shape(make, x)


def _multiply(build: Builder, a: Any, b: Any) -> Flow:
    refuse_unless(not (isinstance(a, Flow) and isinstance(b, Flow)), "multiplies two values that depend on the input")
    x, constant = (a, b) if isinstance(a, Flow) else (b, a)
    return build.keeping_shape(lambda read: Scale(build.beside(x, read, constant), rounded=1), x)


def _divide(build: Builder, a: Any, b: Any) -> Flow:
    refuse_unless(not isinstance(b, Flow), "divides by a value that depends on the input")
    return build.keeping_shape(lambda read: Scale(1 / build.beside(a, read, b), rounded=1), a)


def _matmul(build: Builder, a: Any, b: Any) -> Flow:
    refuse_unless(not (isinstance(a, Flow) and isinstance(b, Flow)), "multiplies two values that depend on the input")
    if isinstance(a, Flow):
        refuse_unless(build.tensor(b).ndim == 2, "multiplies by something other than a matrix")
        return build.add(lambda read: Linear(read(build.tensor(b)).T), a)
    refuse_unless(build.tensor(a).ndim == 2 and b.rank == 2, "multiplies by something other than a matrix")
    turned = build.move(lambda value: value.mT, b)
    product = build.add(lambda read: Linear(read(build.tensor(a))), turned)
    return build.move(lambda value: value.mT, product)


def _functional_linear(build: Builder, x: Flow, weight: Any, bias: Any = None) -> Flow:
    return build.add(lambda read: Linear(read(build.tensor(weight)), read.optional(build.value(bias))), x)


def _functional_convolution(
    build: Builder,
    x: Flow,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Flow:
    refuse_unless(not isinstance(padding, str), f"pads by {padding!r} outside of a layer")
    axes = x.rank - 1

    def make(read: Reader) -> Convolution:
        tensors = read(build.tensor(weight)), read.optional(build.value(bias))
        return Convolution(*tensors, _tuple(stride, axes), _tuple(padding, axes), _tuple(dilation, axes), groups)

    return build.add(make, x)


def _max_pool2d(
    build: Builder,
    x: Flow,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Flow:
    refuse_unless(not return_indices, "asks for the positions of the maxima")
    refuse_unless(x.rank == 3, f"pools records of {x.rank} axes")
    kernel, pad, dilate = (_tuple(each, 2) for each in (kernel_size, padding, dilation))
    step = kernel if stride is None else _tuple(stride, 2)
    return build.add(lambda _: MaxPool(kernel, step, pad, dilate, ceil_mode), x)  # type: ignore[arg-type]


def _averaged(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    def lower(build: Builder, x: Flow, kernel_size: Any, *args: Any, **kwargs: Any) -> Flow:
        terms = math.prod(_tuple(kernel_size, x.rank - 1))
        return build.average(lambda value: function(value, kernel_size, *args, **kwargs), x, terms)

    return lower


def _adaptively_averaged(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    def lower(build: Builder, x: Flow, output_size: Any) -> Flow:
        return build.average(lambda value: function(value, output_size), x, math.prod(build.shape(x)))

    return lower


def _mean(build: Builder, x: Flow, dim: Any, keepdim: bool = False) -> Flow:
    return build.average(lambda value: value.mean(dim, keepdim), x, math.prod(build.shape(x)))


def pad(build: Builder, x: Flow, amounts: Sequence[int], mode: str = "constant", value: float | None = None) -> Flow:
    """F.pad; constants other than 0 are added where nothing was."""
    fill = 0.0 if value is None else float(value)
    if mode != "constant" or fill == 0:
        return build.move(lambda each: F.pad(each, list(amounts), mode), x)
    refuse_unless(math.isfinite(fill), f"pads with {fill}")
    return build.add(lambda _: Padding(lambda each: F.pad(each, list(amounts)), build.shape(x), fill), x)


def _cat(build: Builder, tensors: Sequence[Any], dim: int = 0) -> Flow:
    refuse_unless(all(isinstance(each, Flow) for each in tensors), "joins constants to values of the data")
    axis = dim if dim >= 0 else dim + tensors[0].rank + 1
    refuse_unless(axis >= 1, "joins along the batch, which would mix its records")
    return build.add(lambda _: Concatenation(axis), *tensors)


def _leaky_relu(build: Builder, x: Flow, negative_slope: float = 0.01, **_inplace: bool) -> Flow:
    return build.add(lambda _: Rectifier(float(negative_slope)), x)


def _rectified(build: Builder, x: Flow, **_inplace: bool) -> Flow:
    return build.add(lambda _: Rectifier(), x)


def _clamp(build: Builder, x: Flow, min: Any = None, max: Any = None) -> Flow:
    refuse_unless(all(each is None or isinstance(each, (int, float)) for each in (min, max)), "clamps to a tensor")
    if max is None and min == 0:
        return _rectified(build, x)
    return build.add(lambda _: Monotone(lambda t: t.clamp(min, max)), x)


def _dropped(_build: Builder, x: Flow, _p: float = 0.5, training: bool = True, **_others: Any) -> Flow:
    refuse_unless(not training, "drops values at random even in eval mode")
    return x


def _moved(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    """Functions that only move numbers, whose other arguments are the same for every batch."""

    def lower(build: Builder, x: Flow, *args: Any, **kwargs: Any) -> Flow:
        args, kwargs = build.resolved(args), build.resolved(kwargs)
        return build.move(lambda value: function(value, *args, **kwargs), x)

    return lower


def _reshaped(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    """Functions that keep the order of numbers, whatever they say about the batch."""

    def lower(build: Builder, x: Flow, *args: Any, **kwargs: Any) -> Flow:
        args, kwargs = build.resolved(args), build.resolved(kwargs)
        return build.reshape(x, lambda value: function(value, *args, **kwargs))

    return lower


def _shape(build: Builder, x: Flow, name: str) -> Constant:
    refuse_unless(name == "shape", f"asks for {name!r} of a value")
    return Constant(lambda: (PROBES, *build.shape(x)))


def _size(build: Builder, x: Flow, dim: int | None = None) -> Constant:
    sizes = (PROBES, *build.shape(x))
    return Constant(lambda: sizes if dim is None else sizes[dim])


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    operator.sub: _subtract,
    operator.isub: _subtract,
    torch.sub: _subtract,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    operator.truediv: _divide,
    operator.itruediv: _divide,
    torch.div: _divide,
    operator.neg: lambda build, x: _multiply(build, x, -1.0),
    torch.neg: lambda build, x: _multiply(build, x, -1.0),
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    operator.getitem: _moved(operator.getitem),
    getattr: _shape,
    F.linear: _functional_linear,
    F.conv1d: _functional_convolution,
    F.conv2d: _functional_convolution,
    F.conv3d: _functional_convolution,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool1d: _averaged(F.avg_pool1d),
    F.avg_pool2d: _averaged(F.avg_pool2d),
    F.adaptive_avg_pool1d: _adaptively_averaged(F.adaptive_avg_pool1d),
    F.adaptive_avg_pool2d: _adaptively_averaged(F.adaptive_avg_pool2d),
    torch.mean: _mean,
    F.pad: pad,
    torch.cat: _cat,
    F.relu: _rectified,
    torch.relu: _rectified,
    F.leaky_relu: _leaky_relu,
    torch.sigmoid: lambda build, x: build.add(lambda _: sigmoid(), x),
    F.sigmoid: lambda build, x: build.add(lambda _: sigmoid(), x),
    torch.tanh: lambda build, x: build.add(lambda _: tanh(), x),
    F.tanh: lambda build, x: build.add(lambda _: tanh(), x),
    torch.clamp: _clamp,
    F.dropout: _dropped,
    torch.flatten: _reshaped(torch.flatten),
    torch.reshape: _reshaped(torch.reshape),
    torch.squeeze: _moved(torch.squeeze),
    torch.unsqueeze: _moved(torch.unsqueeze),
    torch.permute: _moved(torch.permute),
    torch.transpose: _moved(torch.transpose),
    torch.index_select: _moved(torch.index_select),
}
METHODS: Mapping[str, Callable[..., Any]] = {
    "add": _add,
    "add_": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "matmul": _matmul,
    "mean": _mean,
    "relu": _rectified,
    "relu_": _rectified,
    "sigmoid": FUNCTIONS[torch.sigmoid],
    "tanh": FUNCTIONS[torch.tanh],
    "clamp": _clamp,
    "size": _size,
    "contiguous": lambda _build, x, **_format: x,
    **{name: _reshaped(getattr(Tensor, name)) for name in ("flatten", "view", "reshape", "unflatten")},
    **{name: _moved(getattr(Tensor, name)) for name in ("squeeze", "unsqueeze", "permute", "transpose")},
}
