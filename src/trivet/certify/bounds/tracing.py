"""From a PyTorch module to steps with bounds: its graph is read once, its weights at every use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from trivet.certify.bounds.handlers import FUNCTIONS, METHODS, MODULES
from trivet.certify.bounds.steps import PROBES, Builder, Constant, Flow, Reader, Step, Unbounded, refuse_unless
from trivet.errors import BadValue
from trivet.models.foreign.twinned import Twinned
from trivet.models.modes import device_of, evaluating
from trivet.randomness import generator


def traced(model: nn.Module, shape: Sequence[int]) -> tuple[tuple[Step, ...], list[torch.Size], torch.dtype]:
    """The steps of `model` in eval mode for inputs [B, *shape], the shape of one record at every node, and its type.

    Of a file that a runtime answers for they are those of its twin.

    Raises:
        BadValue: a step without bounds, or a model that computes something else than its graph says.
    """
    model = model.twin if isinstance(model, Twinned) else model
    probes = _probes(model, shape)
    with evaluating(model), torch.no_grad():
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # tracing runs the user's forward on proxies: anything may be raised
            raise BadValue(
                f"the model cannot be bounded: its forward is no fixed sequence of steps "
                f"({type(error).__name__}: {error}); write it without decisions that depend on the input."
            ) from None
        build = Builder(probes)
        output = _read(model, graph, build)
        refuse_unless(output == len(build.steps), "the model cannot be bounded: its output is not its last step.")
        _compare(model, build)
    return tuple(build.steps), [value.shape[1:] for value in build.values], probes.dtype


def _probes(model: nn.Module, shape: Sequence[int]) -> Tensor:
    draw = generator(0, "probes of bounds")
    rows = torch.rand(PROBES, *shape, generator=draw, dtype=torch.float64)
    rows[-1] = torch.randn(tuple(shape), generator=draw, dtype=torch.float64)
    dtype = next((each.dtype for each in model.state_dict().values() if each.is_floating_point()), torch.float32)
    return rows.to(device_of(model), dtype)


def _handler(module: nn.Module) -> Any:
    """How to bound `module`: as the kind whose forward it has. Parametrized layers compute what their kind does."""
    for kind in type(module).__mro__:
        if kind in MODULES:
            own = type(module)
            same = all(
                getattr(own, name, None) is getattr(kind, name, None)
                for name in ("forward", "_conv_forward", "__call__")
            )
            return MODULES[kind] if same else None
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = _handler(m) is not None or isinstance(m, parametrize.ParametrizationList)
        return known or super().is_leaf_module(m, module_qualified_name)


def _read(model: nn.Module, graph: fx.Graph, build: Builder) -> int:
    """Add a step for each node of the graph that depends on the input; returns the node of the output."""
    values: dict[fx.Node, Any] = {}
    used = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in used:
            used.update(node.all_input_nodes)
    for node in graph.nodes:
        if node not in used and node.op != "placeholder":
            continue
        args, kwargs = (fx.node.map_arg(each, lambda n: values[n]) for each in (node.args, node.kwargs))
        if node.op == "output":
            if not isinstance(args[0], Flow):
                raise BadValue("the model cannot be bounded: it must return one tensor that depends on its input.")
            return args[0].node
        if node.op == "placeholder":
            if values and not args:
                raise BadValue("the model cannot be bounded: it takes more than one input.")
            values[node] = Constant(_returning(args[0])) if values else build.input
            continue
        try:
            values[node] = _value(model, node, args, kwargs, build)
        except TypeError as error:  # arguments that no lowering takes
            raise BadValue(
                f"the model cannot be bounded: {_place(node)} is called in an unknown way ({error})."
            ) from None
        except Unbounded as refused:
            raise BadValue(f"the model cannot be bounded: {_place(node)} {refused}.") from None
    raise AssertionError("a graph ends with its output")


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def _value(model: nn.Module, node: fx.Node, args: Any, kwargs: Any, build: Builder) -> Any:
    """What a node stands for; what depends on no input is computed when it is used, from the weights of then."""
    target: Any = node.target
    if node.op == "get_attr":
        return Constant(lambda: operator.attrgetter(target)(model))
    module = model.get_submodule(target) if node.op == "call_module" else None
    flows: list[Flow] = []
    fx.node.map_aggregate((args, kwargs), lambda each: flows.append(each) if isinstance(each, Flow) else None)
    if not flows:
        method = node.op == "call_method"

        def compute() -> Any:
            given, named = build.resolved(args), build.resolved(kwargs)
            return getattr(given[0], target)(*given[1:], **named) if method else (module or target)(*given, **named)

        return Constant(compute)
    if module is not None:
        refuse_unless(
            not (module._forward_hooks or module._forward_pre_hooks),
            "has hooks, which may change what it computes; remove them (masks belong into parametrizations)",
        )
        handler = _handler(module)
        refuse_unless(handler is not None, f"({type(module).__name__}) has no bounds here")
        return handler(build, module, *args, **kwargs)
    table: Any = METHODS if node.op == "call_method" else FUNCTIONS
    handler = table.get(target)
    refuse_unless(handler is not None, "has no bounds here")
    return handler(build, *args, **kwargs)


def _place(node: fx.Node) -> str:
    kinds = {"call_module": "layer", "call_method": "method", "call_function": "function"}
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{kinds.get(node.op, node.op)} {name}"


def _compare(model: nn.Module, build: Builder) -> None:
    """The steps must compute what the model does, for one record as for several."""

    def through_steps(x: Tensor) -> Tensor:
        values = [x]
        for step in build.steps:
            values.append(step.make(Reader())(*(values[node] for node in step.inputs)))
        return values[-1]

    together = model(build.values[0])
    try:
        alone = model(build.values[0][:1])
    except Exception as error:  # of the user's forward
        raise BadValue(f"the model cannot be bounded: it fails on a batch of one record ({error}).") from None
    scale = float(together.abs().nan_to_num(0.0, 0.0, 0.0).max()) if together.numel() else 0.0

    def same(found: Tensor, expected: Tensor) -> bool:
        return found.shape == expected.shape and torch.allclose(
            found, expected, rtol=1e-3, atol=1e-4 * scale + 1e-30, equal_nan=True
        )

    pairs = (
        (alone, together[:1]),
        (through_steps(build.values[0]), together),
        (through_steps(build.values[0][:1]), alone),
    )
    if not all(same(*pair) for pair in pairs):
        raise BadValue(
            "the model cannot be bounded: it computes something else than its layers in sequence (hooks, in-place "
            "changes, records of a batch that mix?)."
        )
