"""From a foreign graph to PyTorch layers: what the importers of ONNX and torch.export files share.

A foreign graph is rebuilt as a `torch.fx.GraphModule` of ordinary layers (`nn.Conv2d`, `nn.Linear`, `nn.ReLU`, …), so
that whatever works on a model of ours works on it: gradients, folding, hooks, bounds. It is lifted over the batch:
whatever batch size the file was written with, the first axis of every value stands for the records, and a step that
would mix them is refused. Shapes are worked out on the meta device, before anything of that size is allocated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from trivet.errors import TrivetError

MAX_ELEMENTS = 1 << 26
"""The largest value per record an imported graph may compute: 256 MiB of floats."""

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
MEAN_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


@dataclass(frozen=True)
class Flow:
    """A value that depends on the input: its node, and a stand-in [1, ...] on the meta device that knows its shape."""

    node: fx.Node
    stand_in: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one record."""
        return tuple(self.stand_in.shape[1:])


@dataclass(frozen=True)
class Sizes:
    """Some entries of a shape, computed inside the graph; None stands for the batch size."""

    entries: tuple[int | None, ...]


Value = Flow | Sizes | Tensor


class Unsupported(TrivetError):
    """A step of the foreign graph that cannot be rebuilt; the caller adds the file and the node."""


def refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise Unsupported(message)


class Assembly:
    """A model under construction, for inputs [B, *input_shape]."""

    def __init__(self, input_shape: Sequence[int]) -> None:
        refuse_unless(
            0 < math.prod(input_shape) <= MAX_ELEMENTS,
            f"an input of shape {tuple(input_shape)} is empty or too large",
        )
        self.input_shape = tuple(input_shape)
        self.root = nn.Module()
        self._constants: dict[int, str] = {}  # by identity; `root` keeps them alive
        self.graph = fx.Graph()
        self.input = Flow(self.graph.placeholder("x"), torch.empty(1, *input_shape, device="meta"))

    def layer(self, module: nn.Module, value: Flow) -> Flow:
        """`value` through `module`, which becomes part of the model."""
        tensors = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        with torch.no_grad():
            stand_in = functional_call(module.eval(), tensors, (value.stand_in,))
        name = self._place(module)
        return self._checked(self.graph.call_module(name, (value.node,)), stand_in)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Flow:
        """A plain function of flows, constants (which become buffers) and Python values."""
        stand_in = _on_meta(function, args, kwargs)
        nodes = fx.node.map_aggregate(args, self._node)
        return self._checked(self.graph.call_function(function, nodes, kwargs), stand_in)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Flow | Tensor:
        """`call`, or the result at once where all of `args` are constants."""
        flows = [each for each in _flat(args) if isinstance(each, Flow)]
        if flows:
            return self.call(function, *args, **kwargs)
        refuse_unless(
            _on_meta(function, args, kwargs).numel() <= MAX_ELEMENTS,
            f"makes a constant of more than {MAX_ELEMENTS} numbers",
        )
        result: Tensor = function(*args, **kwargs)
        return result

    def combine(self, function: Callable[..., Any], a: Any, b: Any) -> Flow | Tensor:
        """An elementwise operation of two values, either of which may be a constant or a number."""
        ranks = [each.stand_in.ndim for each in (a, b) if isinstance(each, Flow)]
        refuse_unless(
            len(set(ranks)) <= 1
            and all(each.ndim <= rank for rank in ranks for each in (a, b) if isinstance(each, Tensor)),
            "combines values of different rank, which would mix the records of a batch",
        )
        return self.apply(function, a, b)

    def reshape(self, value: Flow, shape: Sequence[int]) -> Flow:
        """Each record to `shape`, which has as many elements."""
        refuse_unless(
            math.prod(shape) == math.prod(value.shape),
            f"reshapes records of {value.shape} to {tuple(shape)}, which would mix the records of a batch",
        )
        if tuple(shape) == value.shape:
            return value
        if len(value.shape) > 1:
            value = self.layer(nn.Flatten(), value)
        return value if len(shape) == 1 else self.layer(nn.Unflatten(1, tuple(shape)), value)

    def mean(self, value: Flow, axes: Sequence[int], keep: bool) -> Flow:
        """The mean over `axes` (1 is the first of a record); over all pixels it is a pooling layer."""
        axes, rank = sorted(axes), value.stand_in.ndim
        if axes == list(range(2, rank)) and len(axes) in MEAN_POOLS:
            pooled = self.layer(MEAN_POOLS[len(axes)](1), value)
            return pooled if keep else self.layer(nn.Flatten(), pooled)
        return self.call(torch.mean, value, axes, keepdim=keep)

    def pick(self, value: Flow, axis: int, index: int | slice) -> Flow:
        """value[:, …, index, …] along `axis`."""
        return self.call(operator.getitem, value, (*[slice(None)] * axis, index))

    def finish(self, output: Value) -> fx.GraphModule:
        """The model, in eval mode; `meta["input_shape"]` tells the shape of one input."""
        if not isinstance(output, Flow):
            raise Unsupported("the output does not depend on the input")
        self.graph.output(output.node)
        model = fx.GraphModule(self.root, self.graph, "ImportedModel")
        model.graph.eliminate_dead_code()
        model.graph.lint()
        model.delete_all_unused_submodules()
        model.recompile()
        model.meta["input_shape"] = self.input_shape
        return model.eval()

    def _place(self, module: nn.Module) -> str:
        kind = type(module).__name__.lower()
        name = f"{kind}{sum(key.startswith(kind) for key, _ in self.root.named_children()) + 1}"
        self.root.add_module(name, module)
        return name

    def _node(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self._constants.setdefault(id(value), f"constant{len(self._constants) + 1}")
            self.root.register_buffer(name, value)
            return self.graph.get_attr(name)
        return value.node if isinstance(value, Flow) else value

    def _checked(self, node: fx.Node, stand_in: Any) -> Flow:
        refuse_unless(isinstance(stand_in, Tensor), "gives more than one result")
        refuse_unless(
            stand_in.ndim >= 1 and stand_in.shape[0] == 1 and stand_in.dtype == torch.float32,
            f"gives {stand_in.dtype} values of shape {tuple(stand_in.shape)} for one record: only float32 values "
            "that keep the records of a batch apart can be attacked",
        )
        refuse_unless(
            stand_in.numel() <= MAX_ELEMENTS,
            f"gives {stand_in.numel()} numbers for each record, and more than {MAX_ELEMENTS} are refused",
        )
        return Flow(node, stand_in)


def _flat(args: Any) -> list[Any]:
    return [each for arg in args for each in (_flat(arg) if isinstance(arg, (list, tuple)) else [arg])]


def _on_meta(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What `function` would return, as a tensor without content."""

    def stand_in(value: Any) -> Any:
        if isinstance(value, Flow):
            return value.stand_in
        return value.to("meta") if isinstance(value, Tensor) else value

    with torch.no_grad():
        return function(*fx.node.map_aggregate(args, stand_in), **kwargs)


def without_batch(wanted: Sequence[int | None], declared: int | None) -> Sequence[int | None]:
    """A shape without its first entry, which must be the batch: free, to be inferred, or as large as `declared`."""
    refuse_unless(
        len(wanted) > 0 and wanted[0] in (None, -1, declared),
        f"reshapes to {list(wanted)}, which does not begin with the batch",
    )
    return wanted[1:]


def record_shape(wanted: Sequence[int | None], elements: int) -> list[int]:
    """The shape of a record of `elements` numbers; one entry may be -1, to be inferred."""
    sizes = [n for n in wanted if n is not None]
    refuse_unless(len(sizes) == len(wanted), "puts the batch size into the shape of a record")
    if -1 in sizes:
        rest = math.prod(n for n in sizes if n != -1)
        refuse_unless(rest > 0 and sizes.count(-1) == 1, f"reshapes records to {sizes}")
        sizes[sizes.index(-1)] = elements // rest
    return sizes


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> nn.Module:
    """The layer with the given weight [out, in / groups, *kernel]."""
    spatial = weight.ndim - 2
    refuse_unless(spatial in CONVOLUTIONS, f"convolves over {spatial} axes")
    refuse_unless(groups >= 1 and weight.shape[0] > 0, f"convolves in {groups} groups")
    with torch.device("meta"):
        layer = CONVOLUTIONS[spatial](
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            stride=tuple(stride),  # type: ignore[arg-type]
            padding=padding if isinstance(padding, str) else tuple(padding),  # type: ignore[arg-type]
            dilation=tuple(dilation),  # type: ignore[arg-type]
            groups=groups,
            bias=bias is not None,
        )
    return with_weights(layer, weight=weight, bias=bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """x W^T + b for weight [out, in]."""
    refuse_unless(weight.ndim == 2, f"multiplies by a tensor of {weight.ndim} axes")
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with_weights(layer, weight=weight, bias=bias)
    return layer


def batch_norm(
    rank: int, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> nn.Module:
    """Normalisation by running statistics, for values of `rank` axes."""
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    refuse_unless(rank in layers, f"normalises values of {rank} axes")
    layer = layers[rank](len(mean), eps=eps, affine=True)
    return with_weights(
        layer,
        running_mean=mean,
        running_var=variance,
        weight=torch.ones_like(mean) if weight is None else weight,
        bias=torch.zeros_like(mean) if bias is None else bias,
    )


def with_weights(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """`layer` with its parameters and buffers replaced by copies of `tensors`, in shapes that must agree."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        refuse_unless(tensor.dtype == torch.float32, f"has {tensor.dtype} weights; export in float32")
        own = getattr(layer, name)
        refuse_unless(
            own is None or own.shape == tensor.shape,
            f"has a {name} of shape {tuple(tensor.shape)} where {tuple(own.shape) if own is not None else ()} belongs",
        )
        kept = tensor.detach().clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(kept) if isinstance(own, nn.Parameter) else kept)
    return layer
