"""A torch.export archive as its users run it: operator for operator as written, without gradients; or compiled."""

from __future__ import annotations

import importlib
import itertools
from functools import reduce
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from trivet.errors import TrivetError, require
from trivet.models.foreign.assembly import Unsupported
from trivet.models.foreign.exported_file import (
    DTYPES,
    Program,
    argument,
    import_exported,
    is_check,
    listed,
    opened,
    result_of,
)
from trivet.models.foreign.exported_graph import passes_on
from trivet.models.foreign.quiet import quiet

MAX_BYTES = 2 << 30


class ExportedModel(nn.Module):
    """The black box beside `load_model`'s twin: what the archive's own operators answer in PyTorch.

    Maps [B, ...] float32 to logits. A quantised program rounds to eight bits and multiplies in float32: that simulates
    integers, and is slower than float. Compiled by TorchInductor its matrix products are done on integers, which may
    fall on the other side of an edge between two levels. The file is read as data by `import_exported`, which refuses
    what is no classifier of known operators; nothing is unpickled.

    Args:
        path: a file ending in `.pt2`.
        batch_size: compile for batches of this size (or the only one that the program takes), to which smaller ones
            are filled up; None to run as written.

    Raises:
        TrivetError: a file that cannot be read, or a compiler that fails; at the call, a request for gradients.
    """

    def __init__(self, path: str | Path, *, batch_size: int | None = None) -> None:
        super().__init__()
        path = Path(path)
        require(path.is_file(), f"{path} is no file.")
        require(batch_size is None or batch_size >= 1, f"batch_size={batch_size} must be at least 1.")
        self.where = str(path)
        shape = import_exported(path, MAX_BYTES).meta["input_shape"]  # refuses what must not run
        with opened(path, MAX_BYTES) as program:
            self.net: nn.Module = _as_written(program)
            self.size: int | None = batch_size if program.batch is None else program.batch
        self.compiled = batch_size is not None
        self.run: Any = _compiled(self.net, torch.zeros(self.size or 1, *shape)) if self.compiled else self.net

    def conditions(self) -> tuple[str, ...]:
        """Under which bounds of the rebuilt graph are bounds of the answers here."""
        if self.compiled:
            raise TrivetError("bounds are none of what a compiled program answers: it computes on integers.")
        return ("as PyTorch computes the program as it is written, in float32 between its levels; not compiled",)

    def forward(self, x: Tensor) -> Tensor:
        require(
            not (torch.is_grad_enabled() and x.requires_grad),
            f"{self.where} runs as it is written and has no gradients; use a black-box attack, or load_model.",
        )
        with torch.no_grad():
            plain = x.detach().cpu()
            if self.size is None:
                logits: Tensor = self.run(plain)
                return logits.to(x.device)
            parts = [self.run(F.pad(part, _filling(part, self.size)))[: len(part)] for part in plain.split(self.size)]
            return torch.cat(parts).to(x.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a program is neither copied nor changed


def _filling(x: Tensor, size: int) -> list[int]:
    """Rows of zeros that make a batch as large as a program was compiled for."""
    return [0] * 2 * (x.ndim - 1) + [0, size - len(x)]


def _as_written(program: Program) -> fx.GraphModule:
    """The nodes of a program that `import_exported` has accepted, as calls of the listed operators."""
    # The operators of quantised programs exist once this was imported.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    root, graph = nn.Module(), fx.Graph()
    values: dict[str, fx.Node] = {}

    def read(name: str) -> fx.Node:
        if name not in values:
            raise Unsupported(f"{name!r} is read, and nothing computes it before")
        return values[name]

    values[program.input] = graph.placeholder("x")
    for number, (name, tensor) in enumerate(program.tensors.items()):
        root.register_buffer(f"stored{number}", tensor)
        values[name] = graph.get_attr(f"stored{number}")
    for node in program.nodes:
        if is_check(str(node["target"])):
            continue
        name, make = listed(str(node["target"]))
        given = {each["name"]: _value(each["arg"], read) for each in node["inputs"]}
        if passes_on(make):
            values[result_of(node)] = given["input"] if "input" in given else given["self"]
            continue
        called: Any = reduce(getattr, name.split("."), torch.ops)  # listed, and so an operator of PyTorch
        # By position, as compilers expect it, as far as the schema lets them and the file goes.
        order = itertools.takewhile(given.__contains__, (a.name for a in called._schema.arguments if not a.kwarg_only))
        placed = tuple(given.pop(each) for each in list(order))
        values[result_of(node)] = graph.call_function(called, placed, given)
    graph.output(read(program.output))
    return fx.GraphModule(root, graph).eval()


def _value(given: Any, read: Any) -> Any:
    """An argument as operators take it: types by themselves, not by number."""
    return DTYPES[given["as_scalar_type"]] if "as_scalar_type" in given else argument(given, read)


def _compiled(net: nn.Module, example: Tensor) -> Any:
    """`net` for batches like `example`, by TorchInductor with its weights taken for constants."""
    # Set for the whole process and not as an option of the call, because the tracer before the compiler asks as well.
    config: Any = importlib.import_module("torch._inductor.config")
    with quiet(), torch.no_grad(), config.patch(freezing=True):
        made = torch.compile(net, fullgraph=True, dynamic=False)
        try:
            made(example)
        except Exception as error:  # compilers fail in many types
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise TrivetError(f"TorchInductor cannot compile the program here: {first}") from error
    return made
