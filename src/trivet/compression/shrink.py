"""Physical shrinking: channels that carry nothing are cut out, and what is left is a smaller ordinary network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from trivet.compression.channels import BATCH_NORMS, Cut, idle
from trivet.compression.compression import Compression, WeightMap
from trivet.errors import BadValue, require
from trivet.methods import method


@method(title="Physical shrinking", legs="small")
@dataclass(frozen=True, kw_only=True)
class Shrink(Compression):
    """Layers with only the listed channels: how a network that was cut is built again before its weights are read.

    The stage `shrink` finds the channels and writes this; nothing has to be known of how they became idle. Layers
    are plain ones afterwards, and every runtime gains.

    Attributes:
        keep: for each layer that lost any, by name, the numbers of the channels that stay: its "outputs", and for
            convolutions and linear layers its "inputs", where only these lost any.
    """

    lasting: ClassVar[bool] = True
    keep: dict[str, dict[str, tuple[int, ...]]]

    def __post_init__(self) -> None:
        for name, kept in self.keep.items():
            require(
                kept.keys() <= {"inputs", "outputs"} and all(kept.values()),
                f"keep={{{name}: …}} must list at least one of the inputs, of the outputs, or both.",
            )

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        raise BadValue("shrinking puts nothing on the weights, and so does not train; use the stage shrink.")

    def attach(self, model: nn.Module) -> None:
        """Cut the layers of `model`, in place.

        Raises:
            BadValue: a layer or a channel that the model does not have.
        """
        layers = dict(model.named_modules())
        for name, kept in self.keep.items():
            require(name in layers, f"keep={{{name}: …}} is about a layer that the model does not have.")
            _cut(layers[name], name, kept)


@torch.no_grad()
def shrunk(model: nn.Module, input_shape: tuple[int, ...]) -> Shrink:
    """Cut out of `model`, in place, every channel that provably carries nothing, and say what was left.

    The function is the same in eval mode, but for rounding where a bias takes over a constant. Layers whose weights
    are computed by parametrizations keep all their channels.

    Raises:
        TrivetError: the graph of the model cannot be traced.
    """
    layers = dict(model.named_modules())
    cuts = idle(model, input_shape)
    for name, cut in cuts.items():
        _fold(layers[name], cut)
    made = Shrink(keep={name: _numbers(cut) for name, cut in cuts.items()})
    made.attach(model)
    return made


def _numbers(cut: Cut) -> dict[str, tuple[int, ...]]:
    sides = {"inputs": cut.inputs, "outputs": cut.outputs}
    return {
        side: tuple(kept.nonzero().flatten().tolist())
        for side, kept in sides.items()
        if kept is not None and not bool(kept.all())
    }


def _fold(layer: Any, cut: Cut) -> None:
    """Let the bias take over the constant inputs that go; without a bias, only zeros and what is not read go."""
    if cut.inputs is None or cut.constant is None or layer.bias is None:
        return
    gone = (~cut.inputs & (cut.constant.nan_to_num() != 0)).to(layer.weight.device)
    if not bool(gone.any()):
        return
    total = layer.weight.flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight
    layer.bias += total[:, gone] @ cut.constant.to(total)[gone]


def _cut(layer: Any, name: str, kept: Mapping[str, tuple[int, ...]]) -> None:
    """Leave only the listed channels of a layer."""
    if isinstance(layer, (*BATCH_NORMS, nn.GroupNorm)):
        width = "num_features" if isinstance(layer, BATCH_NORMS) else "num_channels"
        sizes = {"outputs": (width, 0)}
    elif isinstance(layer, nn.Linear):
        sizes = {"outputs": ("out_features", 0), "inputs": ("in_features", 1)}
    else:
        sizes = {"outputs": ("out_channels", 0), "inputs": ("in_channels", 1)}
    for side, numbers in kept.items():
        attribute, axis = sizes.get(side, ("", 0))
        before = getattr(layer, attribute, 0)
        require(
            max(numbers) < before and min(numbers) >= 0,
            f"keep={{{name}: …}} lists {side} that the model's layer does not have.",
        )
        _select(layer, numbers, axis)
        setattr(layer, attribute, len(numbers))
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = layer.num_groups * len(numbers) // before
        elif side == "outputs" and getattr(layer, "groups", 1) > 1:  # depthwise: inputs are outputs
            layer.groups = layer.in_channels = len(numbers)


def _select(layer: nn.Module, numbers: tuple[int, ...], axis: int) -> None:
    """Keep some rows of all tensors of a layer, or some columns of its weight."""
    for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if tensor.ndim <= axis:  # a count of batches, or the bias where columns go
            continue
        left = tensor.detach().index_select(axis, torch.tensor(numbers, device=tensor.device)).clone()
        setattr(layer, key, nn.Parameter(left, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left)
