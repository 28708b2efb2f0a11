"""Which channels of a network carry nothing, found on its graph: what could be cut out without changing the function.

A channel is one of the outputs of a convolution or linear layer, together with all it is tied to: by normalisation and
activations, by residual sums, by depthwise convolutions, by flattening. It carries nothing where every layer that reads
it multiplies it by zeros, or finds it constant: at zero, or at a value that the reader's bias can take over exactly.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trivet.errors import TrivetError
from trivet.models.baking import baked

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh)
_SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d)
_POINTWISE_CALLS = (torch.relu, F.relu, "relu", torch.tanh, "tanh", torch.sigmoid, "sigmoid")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Cut:
    """What stays of one layer.

    Attributes:
        outputs: of its output channels; of its only ones, where it has as many inputs.
        inputs: of its input channels; None for layers that treat each channel alone.
        constant: [inputs] what each input channel always is, NaN where it varies; for the bias to take over.
    """

    outputs: Tensor
    inputs: Tensor | None
    constant: Tensor | None

    @property
    def cuts(self) -> bool:
        return not bool(self.outputs.all()) or (self.inputs is not None and not bool(self.inputs.all()))


@dataclass
class _Flow:
    """What runs along an edge: the channel [C] each entry of axis 1 belongs to, and its constant value or NaN."""

    channels: Tensor
    constant: Tensor


def idle(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Cut]:
    """What can stay of each layer of `model` (in eval mode) that can lose something, by name.

    Every layer keeps at least one channel. What the analysis does not know keeps all that goes into it.

    Raises:
        TrivetError: the graph of the model cannot be traced.
    """
    computed = {name for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    net = baked(model).eval().cpu()
    try:
        graph = fx.symbolic_trace(net)
        ShapeProp(graph).propagate(torch.zeros(2, *input_shape))
    except Exception as error:  # tracing runs the user's forward on proxies: anything may be raised
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrivetError(f"the graph of {type(model).__name__} cannot be traced, so nothing is cut: {first}") from None
    with torch.no_grad():
        return _Analysis(graph, computed).run()


class _Analysis:
    """One pass over a graph: channels are numbered, tied and followed, then those nobody needs are found."""

    def __init__(self, graph: fx.GraphModule, computed: set[str]) -> None:
        self.graph, self.computed = graph, computed
        self.modules = dict(graph.named_modules())
        self.calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
        self.flows: dict[fx.Node, _Flow] = {}
        self.parent: list[int] = []
        self.fixed: list[Tensor] = []
        self.readers: dict[str, tuple[nn.Module, _Flow, _Flow]] = {}
        self.carriers: dict[str, _Flow] = {}

    def run(self) -> dict[str, Cut]:
        for node in self.graph.graph.nodes:
            flow = self._step(node)
            if flow is not None:
                self.flows[node] = flow
        kept = self._kept()
        cuts = {name: Cut(kept[flow.channels], None, None) for name, flow in self.carriers.items()}
        for name, (_, read, made) in self.readers.items():
            cuts[name] = Cut(kept[made.channels], kept[read.channels], read.constant)
        return {name: cut for name, cut in cuts.items() if cut.cuts}

    def _step(self, node: fx.Node) -> _Flow | None:
        sources = [self.flows[each] for each in node.all_input_nodes if each in self.flows]
        if node.op == "call_module" and len(sources) == 1 and self._known(node):
            made = self._module(node, self.modules[str(node.target)], sources[0])
        elif node.op in ("call_function", "call_method") and len(sources) == len(node.all_input_nodes):
            made = self._call(node, sources)
        else:
            made = None
        if made is not None:
            return made
        self._fix(*sources)
        shape = _shape(node)
        return None if shape is None or len(shape) < 2 or node.op == "output" else self._fresh(shape[1], fixed=True)

    def _known(self, node: fx.Node) -> bool:
        """Used once, with plain weights: else a cut for one use would be a cut for the other."""
        return self.calls[node.target] == 1 and node.target not in self.computed

    def _module(self, node: fx.Node, module: nn.Module, read: _Flow) -> _Flow | None:
        name = str(node.target)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return self._weighted(name, module, read)
        if isinstance(module, (*BATCH_NORMS, nn.GroupNorm)):
            return self._normed(name, module, read)
        if isinstance(module, _POINTWISE):
            return _Flow(read.channels, module(read.constant.clone()))  # some work in place
        if isinstance(module, (*_SAME, *_ADAPTIVE)):
            return read
        if isinstance(module, _POOLS):
            # A mean that counts its border of zeros is not constant along it.
            bordered = not isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and _padded(module)
            return _Flow(
                read.channels, read.constant.where(read.constant == 0, torch.nan) if bordered else read.constant
            )
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flattened(node, read)
        return None

    def _weighted(self, name: str, module: Any, read: _Flow) -> _Flow | None:
        weight, bias = module.weight, module.bias
        base = weight.new_zeros(len(weight)) if bias is None else bias
        if isinstance(module, nn.Linear) and len(read.channels) != module.in_features:
            return None  # applied along another axis than that of the channels
        # Along a border of zeros only zeros are constant.
        usable = read.constant.where(read.constant == 0, torch.nan) if _padded(module) else read.constant
        if getattr(module, "groups", 1) == 1:
            total = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            terms = (total * usable).where(_live(weight), 0.0)  # NaN where a varying input counts
            made = self._fresh(len(weight))
            made.constant = base + terms.sum(1)
            self.readers[name] = (module, read, made)
            return made
        if module.groups == module.in_channels == module.out_channels:
            terms = (weight.flatten(1).sum(1) * usable).where(_live(weight)[:, 0], 0.0)
            made = _Flow(read.channels, base + terms)
            self.carriers[name] = made
            return made
        return None

    def _normed(self, name: str, module: Any, read: _Flow) -> _Flow | None:
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            return None
        if isinstance(module, nn.GroupNorm):
            for group in read.channels.chunk(module.num_groups):  # equal parts: a group goes as a whole or not at all
                self._tie(group[1:], group[:1].expand(len(group) - 1))
        sides = 1 if isinstance(module, nn.BatchNorm1d) else 2
        constant = module(read.constant.reshape(1, -1, *(1,) * sides).expand(1, -1, *(2,) * sides))[0].flatten(1)[:, 0]
        if module.weight is not None:
            constant = constant.where(module.weight != 0, module.bias)
        made = _Flow(read.channels, constant)
        self.carriers[name] = made
        return made

    def _flattened(self, node: fx.Node, read: _Flow) -> _Flow | None:
        shape, before = _shape(node), _shape(node.all_input_nodes[0])
        if shape is None or before is None or len(shape) != 2:
            return None
        each = shape[1] // before[1]
        return _Flow(read.channels.repeat_interleave(each), read.constant.repeat_interleave(each))

    def _call(self, node: fx.Node, sources: Sequence[_Flow]) -> _Flow | None:
        shapes = [_shape(each) for each in (node, *node.all_input_nodes)]
        if not sources or any(shape is None for shape in shapes):
            return None
        tensors = len([each for each in node.args if isinstance(each, fx.Node)])
        first = sources[0]
        if node.target in _ADD and len(sources) == tensors == len(node.args) == 2 and not node.kwargs:
            if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
                return None
            self._tie(first.channels, sources[1].channels)
            return _Flow(first.channels, first.constant + sources[1].constant)
        if len(sources) != 1 or tensors != 1:
            return None
        if node.target in _POINTWISE_CALLS:
            kind: Callable[[Tensor], Tensor] = getattr(torch, str(getattr(node.target, "__name__", node.target)))
            return _Flow(first.channels, kind(first.constant))
        if node.target in (torch.flatten, "flatten") and node.args[1:] in ((1,), (1, -1)) and not node.kwargs:
            return self._flattened(node, first)
        return None

    def _fresh(self, count: int, fixed: bool = False) -> _Flow:
        start = len(self.parent)
        self.parent += range(start, start + count)
        made = _Flow(torch.arange(start, start + count), torch.full((count,), torch.nan))
        if fixed:
            self._fix(made)
        return made

    def _fix(self, *flows: _Flow) -> None:
        self.fixed += [flow.channels for flow in flows]

    def _tie(self, first: Tensor, second: Tensor) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self.parent[self._root(a)] = self._root(b)

    def _root(self, channel: int) -> int:
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def _kept(self) -> Tensor:
        """Boolean, over all channels: those that stay."""
        count = len(self.parent)
        root = torch.tensor([self._root(channel) for channel in range(count)], dtype=torch.long)
        needed = torch.zeros(count, dtype=torch.bool)
        for channels in self.fixed:
            needed[root[channels]] = True
        made = [flow.channels for _, _, flow in self.readers.values()]
        while True:  # who is read by none but those that go, goes as well
            before = needed.clone()
            for module, read, out in self.readers.values():
                used = _live(module.weight)[needed[root[out.channels]]].any(0)  # type: ignore[arg-type]
                needed[root[read.channels[used & ~_foldable(module, read.constant)]]] = True
            if bool((needed == before).all()):
                empty = [channels for channels in made if not bool(needed[root[channels]].any())]
                if not empty:
                    return needed[root]
                needed[root[empty[0][0]]] = True  # a layer without channels is none


def _foldable(module: nn.Module, constant: Tensor) -> Tensor:
    """Which input channels a layer can do without: those at zero, and constants that its bias can take over."""
    folds = module.bias is not None and not _padded(module)
    return (constant.isfinite() if folds else torch.zeros_like(constant, dtype=torch.bool)) | (constant == 0)


def _live(weight: Tensor) -> Tensor:
    """Boolean [out, in]: whether any weight from an input to an output is not zero."""
    return (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0


def _padded(module: nn.Module) -> bool:
    padding: Any = getattr(module, "padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return None if meta is None or not hasattr(meta, "shape") else tuple(meta.shape)
