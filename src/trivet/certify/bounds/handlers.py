"""All kinds of layers, functions and methods that have bounds: the common ones, and those of the files named below.

What is not in these tables is refused, never skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.certify.bounds import functions, modules
from trivet.certify.bounds.curves import celu, elu, gelu, silu, softplus
from trivet.certify.bounds.functions import per_axis
from trivet.certify.bounds.moving import Moving, Padding, Scale
from trivet.certify.bounds.pooling import MaxPool
from trivet.certify.bounds.softmax import Softmax
from trivet.certify.bounds.staircase import Dequantised, Levels, Staircase
from trivet.certify.bounds.standardise import Standardise
from trivet.certify.bounds.steps import Builder, Flow, Reader, refuse_unless
from trivet.certify.bounds.transposed import TransposedConvolution
from trivet.models.foreign.quantized import Dequantize, Quantize


def _gelu(build: Builder, x: Flow, approximate: str = "none") -> Flow:
    return build.add(lambda _: gelu(approximate), x)


def _silu(build: Builder, x: Flow, inplace: bool = False) -> Flow:  # noqa: ARG001 - as it is called
    return build.add(lambda _: silu(), x)


def _softplus(build: Builder, x: Flow, beta: float = 1.0, threshold: float = 20.0) -> Flow:
    refuse_unless(beta > 0, f"with beta={beta} has no bounds here; it must be positive")
    return build.add(lambda _: softplus(float(beta), float(threshold)), x)


def _elu(build: Builder, x: Flow, alpha: float = 1.0, inplace: bool = False) -> Flow:  # noqa: ARG001
    refuse_unless(0 <= alpha <= 1, f"ELU with alpha={alpha} has no bounds here; they need [0, 1]")
    return build.add(lambda _: elu(float(alpha)), x)


def _celu(build: Builder, x: Flow, alpha: float = 1.0, inplace: bool = False) -> Flow:  # noqa: ARG001
    refuse_unless(alpha > 0, f"CELU with alpha={alpha} has no bounds here; it must be positive")
    return build.add(lambda _: celu(float(alpha)), x)


def _softmax(build: Builder, x: Flow, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Flow:
    typed = dtype is not None or not isinstance(_stacklevel, int)  # which may stand where F.softmax has its depth
    refuse_unless(isinstance(dim, int) and not typed, "must say over which axis, and keep its type")
    axis = dim if dim >= 0 else dim + x.rank + 1
    refuse_unless(axis >= 1, "compares the records of a batch")
    last = x.rank
    x = build.move(lambda value: value.transpose(axis, last), x) if axis != last else x
    shape = build.shape(x)
    x = build.reshape(x, lambda value: value.reshape(len(value), -1, shape[-1]))
    x = build.add(lambda _: Softmax(), x)
    x = build.reshape(x, lambda value: value.reshape(len(value), *shape))
    return build.move(lambda value: value.transpose(axis, last), x) if axis != last else x


def _standardised(build: Builder, x: Flow, groups: int, eps: float, *, centred: bool = True) -> Flow:
    """Each of `groups` equal runs of a record's numbers by its own mean and variance."""
    shape = build.shape(x)
    size = math.prod(shape) // groups
    refuse_unless(size > 1 or not centred, "normalises single values, of which it leaves nothing")
    x = build.reshape(x, lambda value: value.reshape(len(value), groups, size))
    x = build.add(lambda _: Standardise(eps, centred), x)
    return build.reshape(x, lambda value: value.reshape(len(value), *shape))


def _scaled(build: Builder, x: Flow, weight: Any, bias: Any, shape: tuple[int, ...]) -> Flow:
    """By weights and biases, broadcast with a record as `shape`."""
    if weight is None and bias is None:
        return x

    def make(read: Reader) -> Scale:
        factor = read(build.tensor(1.0 if weight is None else weight))
        factor = factor.reshape(shape) if factor.ndim else factor
        return Scale(factor, None if bias is None else read(build.tensor(bias)).reshape(shape), rounded=4)

    return build.keeping_shape(make, x)


def _layer_norm(
    build: Builder, x: Flow, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Flow:
    axes = tuple(normalized_shape)
    refuse_unless(build.shape(x)[x.rank - len(axes) :] == axes, f"normalises {axes} of records {build.shape(x)}")
    whole = math.prod(build.shape(x)) // math.prod(axes)
    return _scaled(build, _standardised(build, x, whole, eps), weight, bias, axes)


def _rms_norm(build: Builder, x: Flow, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Flow:
    axes = tuple(normalized_shape)
    refuse_unless(build.shape(x)[x.rank - len(axes) :] == axes, f"normalises {axes} of records {build.shape(x)}")
    whole = math.prod(build.shape(x)) // math.prod(axes)
    least = torch.finfo(build.values[0].dtype).eps if eps is None else eps
    return _scaled(build, _standardised(build, x, whole, least, centred=False), weight, None, axes)


def _group_norm(
    build: Builder, x: Flow, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Flow:
    shape = (-1, *[1] * (x.rank - 1))
    return _scaled(build, _standardised(build, x, num_groups, eps), weight, bias, shape)


def _instance_norm(build: Builder, module: Any, x: Flow) -> Flow:
    refuse_unless(not module.track_running_stats, "InstanceNorm with running statistics has no bounds here")
    refuse_unless(build.shape(x)[0] == module.num_features, f"normalises {module.num_features} channels of another x")
    return _group_norm(build, x, module.num_features, module.weight, module.bias, module.eps)


def _transposed_convolution(
    build: Builder,
    x: Flow,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Flow:
    axes = x.rank - 1

    def make(read: Reader) -> TransposedConvolution:
        tensors = read(build.tensor(weight)), read.optional(build.value(bias))
        step, pad, left, dilate = (per_axis(each, axes) for each in (stride, padding, output_padding, dilation))
        return TransposedConvolution(*tensors, step, pad, left, groups, dilate)

    return build.add(make, x)


def _max_pooled(axes: int) -> Callable[..., Flow]:
    """Pooling over one axis, or over three: first over the last two of them, then over the first."""

    def lower(
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
        refuse_unless(x.rank == axes + 1, f"pools records of {x.rank} axes")
        kernel, pad, dilate = (per_axis(each, axes) for each in (kernel_size, padding, dilation))
        step = kernel if stride is None else per_axis(stride, axes)
        windows = list(zip(kernel, step, pad, dilate, strict=True))
        if axes == 1:
            return _pooled(build, x, (-1, 1, build.shape(x)[1]), (_NONE, windows[0]), ceil_mode, (-1,))
        depth, height, width = build.shape(x)[1:]
        x = _pooled(build, x, (-1, height, width), (windows[1], windows[2]), ceil_mode, (depth, -1))
        height, width = (F.max_pool2d(torch.zeros(1, height, width), *_turned(windows[1:], ceil_mode))).shape[1:]
        return _pooled(build, x, (-1, depth, height * width), (windows[0], _NONE), ceil_mode, (-1, height, width))

    return lower


_NONE = (1, 1, 0, 1)
"""Kernel, stride, padding and dilation of an axis that is not pooled over."""


def _turned(windows: Any, ceil: bool) -> Any:
    return *(tuple(each) for each in zip(*windows, strict=True)), ceil


def _pooled(build: Builder, x: Flow, maps: Any, windows: Any, ceil: bool, after: tuple[int, ...]) -> Flow:
    channels = build.shape(x)[0]
    x = build.reshape(x, lambda value: value.reshape(len(value), *maps))
    x = build.add(lambda _: MaxPool(*_turned(windows, ceil)), x)
    return build.reshape(x, lambda value: value.reshape(len(value), channels, *after))


def _whole(function: Callable[[Tensor], Tensor], below: float, above: float) -> Callable[..., Flow]:
    return lambda build, x: build.add(lambda _: Staircase(function, below, above), x)


def _quantised(build: Builder, x: Flow, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Flow:
    return _on_grid(build, x, scale, zero_point, quant_min, quant_max, ())


def _quantised_by_channel(
    build: Builder, x: Flow, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int
) -> Flow:
    refuse_unless(axis >= 1, "has a step for each record of a batch")
    return _on_grid(build, x, scale, zero_point, quant_min, quant_max, (-1, *[1] * (x.rank - axis)))


def _on_grid(build: Builder, x: Flow, scale: Any, zero: Any, least: int, most: int, shape: tuple[int, ...]) -> Flow:
    def make(read: Reader) -> Staircase:
        step, shift = (read(build.tensor(each).float()).reshape(shape) for each in (scale, zero))
        return Staircase(torch.round, 0.5, 0.5, step, least - shift, most - shift)

    return build.keeping_shape(make, x)


def _to_levels(build: Builder, module: Quantize, x: Flow) -> Flow:
    off = 0.0 if _on_grid_of(build, module, x.node) else 0.5

    def make(read: Reader) -> Levels:
        step, zero = (build.beside(x, read, each) for each in (module.scale, module.zero))
        return Levels(torch.round, off, off, step, module.low - zero, module.high - zero, zero)

    return build.keeping_shape(make, x)


def _on_grid_of(build: Builder, module: Quantize, node: int) -> bool:
    """Whether values were on this very grid before they were only moved or compared, so that rounding keeps them."""
    while node:
        step = build.steps[node - 1]
        layer, node = step.make(Reader()), step.inputs[0]
        if isinstance(layer, Dequantised):
            before = build.steps[node - 1].make(Reader()) if node else None
            if not isinstance(before, Levels):
                return False
            pairs = ((before.step, before.zero), (layer.factor, layer.zero), (module.scale, module.zero))
            if any(each is None or each.numel() != 1 for pair in pairs for each in pair):
                return False
            ends = [float(before(torch.tensor(end))) for end in (-math.inf, math.inf)]
            return ends == [module.low, module.high] and len({tuple(map(float, pair)) for pair in pairs}) == 1  # type: ignore[arg-type]
        if not isinstance(layer, (Moving, MaxPool)) or isinstance(layer, Padding):
            return False
    return False


def _from_levels(build: Builder, module: Dequantize, x: Flow) -> Flow:
    def make(read: Reader) -> Dequantised:
        return Dequantised.of(*(build.beside(x, read, each) for each in (module.scale, module.zero)))

    return build.keeping_shape(make, x)


FUNCTIONS: Mapping[Any, Callable[..., Any]] = functions.FUNCTIONS | {
    F.gelu: _gelu,
    F.silu: _silu,
    F.softplus: _softplus,
    F.elu: _elu,
    F.celu: _celu,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.max_pool1d: _max_pooled(1),
    F.max_pool3d: _max_pooled(3),
    torch.round: _whole(torch.round, 0.5, 0.5),
    torch.floor: _whole(torch.floor, 1.0, 0.0),
    torch.ceil: _whole(torch.ceil, 0.0, 1.0),
    torch.fake_quantize_per_tensor_affine: _quantised,
    torch.fake_quantize_per_channel_affine: _quantised_by_channel,
}
METHODS: Mapping[str, Callable[..., Any]] = {
    **functions.METHODS,
    "softmax": _softmax,
    "round": FUNCTIONS[torch.round],
    "floor": FUNCTIONS[torch.floor],
    "ceil": FUNCTIONS[torch.ceil],
}


def _pool_layer(build: Builder, module: Any, x: Flow) -> Flow:
    return _max_pooled(1 if isinstance(module, nn.MaxPool1d) else 3)(
        build, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
        module.return_indices,
    )  # fmt: skip


def _transposed_layer(build: Builder, module: Any, x: Flow) -> Flow:
    return _transposed_convolution(
        build, x, module.weight, module.bias, module.stride, module.padding, module.output_padding, module.groups,
        module.dilation,
    )  # fmt: skip


MODULES: Mapping[type[nn.Module], Callable[..., Flow]] = {
    **modules.MODULES,
    nn.GELU: lambda build, module, x: _gelu(build, x, module.approximate),
    nn.SiLU: lambda build, _module, x: _silu(build, x),
    nn.Softplus: lambda build, module, x: _softplus(build, x, module.beta, module.threshold),
    nn.ELU: lambda build, module, x: _elu(build, x, module.alpha),
    nn.CELU: lambda build, module, x: _celu(build, x, module.alpha),
    nn.Softmax: lambda build, module, x: _softmax(build, x, module.dim),
    nn.LayerNorm: lambda build, module, x: _layer_norm(
        build, x, module.normalized_shape, module.weight, module.bias, module.eps
    ),
    nn.RMSNorm: lambda build, module, x: _rms_norm(build, x, module.normalized_shape, module.weight, module.eps),
    nn.GroupNorm: lambda build, module, x: _group_norm(
        build, x, module.num_groups, module.weight, module.bias, module.eps
    ),
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.ConvTranspose1d: _transposed_layer,
    nn.ConvTranspose2d: _transposed_layer,
    nn.ConvTranspose3d: _transposed_layer,
    nn.MaxPool1d: _pool_layer,
    nn.MaxPool3d: _pool_layer,
    Quantize: _to_levels,
    Dequantize: _from_levels,
}
