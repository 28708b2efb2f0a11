"""A fast stand-in for a model, for gradient queries: frozen, in eval mode, BatchNorm folded, bf16 and channels-last.

An attack asks for one input gradient after another of a model that does not change in between. A stand-in with
convolution and BatchNorm folded into one (exact up to rounding) and the multiplications in bfloat16 gives the same
directions two to four times sooner on processors with matrix units. It proposes; success is always judged on the
model itself, in its own precision.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from trivet.models.baking import baked, draws
from trivet.models.grey_convolution import GreyConvolution
from trivet.models.rectifiers import cheapen_rectifiers

Precision = Literal["fp32", "bf16"]
Logits = Callable[[Tensor], Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Surrogate(nn.Module):
    """Stands in for `model` in eval mode; `refresh` copies the model's present weights.

    Maps [B, ...] float32 to float32 logits [B, K]; its parameters do not require gradients. Models that
    `torch.fx` cannot trace are used without folding.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self._folded: dict[str, str] = {}  # convolution -> the BatchNorm it has absorbed
        traced = _traced(model)
        self.net: nn.Module = self._prepared(_frozen(model) if traced is None else self._fold(traced))
        self._kept = traced is not None

    def _prepared(self, net: nn.Module) -> nn.Module:
        if self.precision == "bf16":
            for module in net.modules():
                if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
                    module.to(torch.bfloat16)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in net.modules():
            GreyConvolution.adopt(module)
        return net

    def _fold(self, graph: fx.GraphModule) -> fx.GraphModule:
        modules = dict(graph.named_modules())
        for node in list(graph.graph.nodes):
            if node.op != "call_module" or not isinstance(modules[node.target], _NORMS):
                continue
            before = node.args[0]
            foldable = (
                before.op == "call_module"
                and isinstance(modules[before.target], _CONVOLUTIONS)
                and len(before.users) == 1
                and [n.target for n in graph.graph.nodes].count(before.target) == 1
                and modules[node.target].track_running_stats
            )
            if foldable:
                convolution = modules[before.target]
                if convolution.bias is None:
                    convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels), False)
                self._folded[before.target] = node.target
                node.replace_all_uses_with(before)
                graph.graph.erase_node(node)
        cheapen_rectifiers(graph)
        graph.recompile()
        return graph

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> Surrogate:
        """Take over the weights and buffers that `model` has now."""
        if not self._kept:  # an untraced forward may read anything of its module: copy all of it
            self.net = self._prepared(_frozen(model))
            return self
        live = dict(model.named_modules(remove_duplicate=False))
        for name, module in self.net.named_modules():
            source = live.get(name)
            if source is None:
                continue
            if name in self._folded:
                norm = live[self._folded[name]]
                weight, bias = fuse_conv_bn_weights(
                    source.weight, source.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                module.weight.copy_(weight)
                module.bias.copy_(bias)
                continue
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                # getattr, not the source's parameter: a parametrized weight is computed on access.
                tensor.copy_(getattr(source, key))
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = self.net(x)
        return logits.float()


def _frozen(model: nn.Module) -> nn.Module:
    return baked(model).eval().requires_grad_(False)


def _traced(model: nn.Module) -> fx.GraphModule | None:
    """The graph of `model` in eval mode, or None where a graph would not do what the model does.

    That is: where tracing fails, where a tensor made in forward would be frozen at its value of now, and where two
    traces differ, because something random was drawn by Python.
    """
    net = _frozen(model)
    if draws(net):  # the copies of a trace would be of one draw
        return None
    try:
        graph, again = fx.symbolic_trace(net), fx.symbolic_trace(net)
    except Exception:  # tracing runs the user's forward on proxies: anything may be raised, and is no fault
        return None
    constant = any(name.startswith("_tensor_constant") for name, _ in graph.named_buffers())
    return None if constant or graph.code != again.code else graph


_CACHE: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Surrogate]] = WeakKeyDictionary()


def surrogate(model: nn.Module, precision: Precision) -> Surrogate:
    """The up-to-date stand-in for `model`; traced once per model, its weights copied at every call."""
    known = _CACHE.setdefault(model, {})
    shape = reduce(operator.add, ((name, id(module)) for name, module in model.named_modules()), ())
    if (precision, shape) not in known:
        for outdated in [key for key in known if key[1] != shape]:
            del known[outdated]
        known[precision, shape] = Surrogate(model, precision)
    return known[precision, shape].refresh(model)
