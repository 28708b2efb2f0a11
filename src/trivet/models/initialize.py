"""The first weights, drawn from a named generator, so that a run's starting point is a function of its seed.

Each rule overwrites every convolution and linear layer of a model in place. `generator=None` draws from PyTorch's
global generator. Normalisation layers keep their ones and zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn


def _layers(model: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    return (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


def _fan_in(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.weight[0].numel()


@torch.no_grad()
def uniform_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """PyTorch's own default: weights and biases uniform in ±1 / sqrt(fan_in)."""
    for layer in _layers(model):
        bound = 1.0 / math.sqrt(_fan_in(layer))
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def kaiming_(model: nn.Module, generator: torch.Generator | None = None, *, fan: str = "fan_in") -> None:
    """He et al. (ICCV 2015): weights normal with variance 2 / fan, biases zero; `fan` is "fan_in" or "fan_out"."""
    for layer in _layers(model):
        nn.init.kaiming_normal_(layer.weight, mode=fan, nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
        if layer.bias is not None:
            layer.bias.zero_()


@torch.no_grad()
def fan_in_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """LeCun et al. (1998): weights normal with variance 1 / fan_in, biases zero."""
    for layer in _layers(model):
        layer.weight.normal_(std=1.0 / math.sqrt(_fan_in(layer)), generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()


@torch.no_grad()
def ibp_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Shi et al. (NeurIPS 2021): weights normal with deviation sqrt(2 pi) / fan_in, but the last layer's.

    A layer then hands on intervals as wide as those it gets, where the usual rules widen them layer by layer. The
    last layer's weights and all biases are PyTorch's default. Made for networks with BatchNorm: without it activations
    shrink from layer to layer.
    """
    uniform_(model, generator)
    for layer in list(_layers(model))[:-1]:
        layer.weight.normal_(std=math.sqrt(2 * math.pi) / _fan_in(layer), generator=generator)


@torch.no_grad()
def truncated_normal_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """The TensorFlow tutorial's rule: weights normal with deviation 0.1 cut at two deviations, biases 0.1."""
    for layer in _layers(model):
        nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2, generator=generator)
        if layer.bias is not None:
            layer.bias.fill_(0.1)


@torch.no_grad()
def residual_(model: nn.Module, generator: torch.Generator | None = None, *, zero_last: str | None = None) -> None:
    """Residual networks: convolutions after He et al. with fan_out, linear layers after PyTorch's default.

    The convolution called `zero_last` in each block, if given, starts at zero: the block is then the identity.
    """
    uniform_(model, generator)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            kaiming_(module, generator, fan="fan_out")
            if zero_last is not None and name.endswith(f".{zero_last}"):
                module.weight.zero_()
