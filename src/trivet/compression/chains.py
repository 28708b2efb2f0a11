"""Layers stored as factors, made chains of plain layers of equal function, which multiply less than their kernels.

    Tucker and CP:  C_in -> r_in by U_in (1x1), r_in -> r_out by the core (k x k), r_out -> C_out by U_out (1x1)

The factors of rows and columns are contracted into the core; that of CP terms is diagonal, and so a depthwise
convolution. A 1x1 layer that does not save multiplications is contracted into the core as well: of a linear layer, all
of whose kernel is 1x1, two layers are left.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.compression.compression import WEIGHTED, originals, steps_on
from trivet.compression.tensorization import Factorised, PerRecord

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@torch.no_grad()
def chained(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """A copy of `model`, in eval mode on the CPU, whose factorised layers are chains; for inputs [B, *input_shape].

    Left as they are: layers whose weight is drawn anew in every pass or binarised, or is compressed further; grouped
    convolutions; padding by anything but zeros; layers that the network does not call; and those whose chain has no
    fewer multiplications than the dense kernel. Products are summed in another order, so outputs are equal to rounding.
    """
    net = copy.deepcopy(model).eval().cpu()
    works: dict[nn.Module, _Work] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outs, ins = layer.weight.shape[:2]
        works[layer] = _Work(inputs[0].numel() // ins, output.numel() // outs)

    hooks = [module.register_forward_hook(note) for module in net.modules() if _divides(module)]
    if not hooks:
        return net
    net(torch.zeros(1, *input_shape))
    for hook in hooks:
        hook.remove()
    made = {layer: found for layer, work in works.items() if (found := _chain(layer, work)) is not None}
    for module in list(net.modules()):
        for name, child in module._modules.items():  # under all its names, where a layer has several
            if child in made:
                setattr(module, name, made[child])
    return made.get(net, net)


@dataclass(frozen=True)
class _Work:
    """At how many positions a layer reads its inputs, and makes its outputs."""

    read: int
    made: int


def _divides(layer: nn.Module) -> bool:
    kind = parametrize.type_before_parametrizations(layer)
    if issubclass(kind, PerRecord):  # a class made of this mixin and the plain layer, which without draws it is
        kind = kind.__bases__[-1]
    steps = steps_on(layer) if kind in WEIGHTED else []
    if len(steps) != 1 or not isinstance(steps[0], Factorised) or steps[0].randomised or steps[0].binary:
        return False
    return kind is nn.Linear or bool(layer.groups == 1 and layer.padding_mode == "zeros")


def _chain(layer: Any, work: _Work) -> nn.Sequential | None:
    """The chain of the fewest multiplications, or None where the dense kernel has no more."""
    step: Any = steps_on(layer)[0]
    links = step.links(*originals(layer))
    outs, ins, *kernel = layer.weight.shape
    size = torch.Size(kernel).numel()

    def multiplications(first: bool, last: bool) -> int:
        read, made = links.first.shape[0] if first else ins, links.last.shape[1] if last else outs
        middle = read * made * size // (read if links.depthwise and first and last else 1)
        return first * read * ins * work.read + (middle + last * made * outs) * work.made

    ways = [(False, False), (True, False), (False, True), (True, True)]  # of equal ones the first, the dense kernel
    first, last = min(ways, key=lambda way: multiplications(*way))
    if not first and not last:
        return None
    alone = links.depthwise and first and last
    chain = [_pointwise(layer, links.first)] if first else []
    chain.append(_like(layer, links.middle(first, last), links.core.shape[0] if alone else 1))
    if last:
        chain.append(_pointwise(layer, links.last))
    if layer.bias is not None:
        # The first 1x1 layer has none, and so makes zeros of zeros: padding behind it is padding before it.
        chain[-1].bias = nn.Parameter(layer.bias.detach().clone())
    return nn.Sequential(*chain)


def _pointwise(layer: Any, weight: Tensor) -> Any:
    """A 1x1 convolution, or a linear layer, of `weight` [outputs, inputs]."""
    if isinstance(layer, nn.Linear):
        return _like(layer, weight, 1)
    ones = (1,) * (layer.weight.ndim - 2)
    made = _CONVOLUTIONS[len(ones)](*weight.mT.shape, ones, bias=False, device="meta")
    return _with(made, weight.reshape(*weight.shape, *ones))


def _like(layer: Any, weight: Tensor, groups: int) -> Any:
    """The layer with another kernel, and without bias."""
    outs, ins, *kernel = weight.shape
    if isinstance(layer, nn.Linear):
        return _with(nn.Linear(ins, outs, bias=False, device="meta"), weight)
    moves = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": groups}
    make = _CONVOLUTIONS[len(kernel)]
    return _with(make(ins * groups, outs, tuple(kernel), bias=False, device="meta", **moves), weight)


def _with(layer: Any, weight: Tensor) -> Any:
    """The layer, made without numbers of its own, and so without drawing any, with those of `weight`."""
    layer.weight = nn.Parameter(weight.contiguous().clone())
    return layer
