"""Which bounds each kind of PyTorch layer has. What is not here is refused, never skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from trivet.certify.bounds.activations import Monotone, Rectifier, sigmoid, tanh
from trivet.certify.bounds.affine import Convolution, Linear
from trivet.certify.bounds.functions import max_pool2d, pad, per_axis
from trivet.certify.bounds.moving import Scale
from trivet.certify.bounds.steps import Builder, Flow, Reader, refuse_unless
from trivet.models.normalize import Normalize

_MEAN_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _linear(build: Builder, module: nn.Linear, x: Flow) -> Flow:
    return build.add(lambda read: Linear(read(module.weight), read.optional(module.bias)), x)


def _convolution(build: Builder, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Flow) -> Flow:
    before = list(module._reversed_padding_repeated_twice)
    padding: tuple[int, ...] = per_axis(0, len(module.kernel_size))
    if module.padding_mode != "zeros":
        mode = module.padding_mode
        x = build.move(lambda value: F.pad(value, before, mode), x)
    elif before[::2] == before[1::2]:
        padding = tuple(reversed(before[::2]))
    else:
        x = pad(build, x, before)

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
        mean, variance = (read(each) for each in (module.running_mean, module.running_var))  # type: ignore[arg-type]
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
    return max_pool2d(
        build, x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
        module.return_indices,
    )  # fmt: skip


def _flatten(build: Builder, module: nn.Flatten, x: Flow) -> Flow:
    return build.reshape(x, lambda value: value.flatten(module.start_dim, module.end_dim))


def _unflatten(build: Builder, module: nn.Unflatten, x: Flow) -> Flow:
    return build.reshape(x, module)


def _pool(build: Builder, module: nn.Module, x: Flow) -> Flow:
    return build.average(module, x, math.prod(per_axis(module.kernel_size, x.rank - 1)))


def _adaptive_pool(build: Builder, module: nn.Module, x: Flow) -> Flow:
    return build.average(module, x, math.prod(build.shape(x)[1:]))


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
