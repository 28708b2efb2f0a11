"""A network as a list of steps whose weights stay where they are: read anew, in any precision, at every use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from trivet.certify.bounds.affine import Averaging
from trivet.certify.bounds.layer import Layer
from trivet.certify.bounds.moving import Moving, Reshaping
from trivet.errors import TrivetError

PROBES = 3
"""Rows of made-up inputs on which a traced network is compared with its model."""


class Unbounded(TrivetError):
    """A step without bounds; the caller adds where it stands."""


def refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise Unbounded(message)


@dataclass(frozen=True, eq=False)
class Reader:
    """Hands out weights for one use: live parameters in their own type, or copies in `dtype`.

    Attributes:
        dtype: None for the type that they have.
        exact: whether error terms will be asked for.
    """

    dtype: torch.dtype | None = None
    exact: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def optional(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self(tensor)


Make = Callable[[Reader], Layer]


@dataclass(frozen=True, eq=False)
class Step:
    """Layer number i + 1 of a network: how to make it, and the nodes it reads; node 0 is the input."""

    make: Make
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Flow:
    """A node: a value that depends on the input; `rank` counts the axes of one record."""

    node: int
    rank: int


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that does not depend on the input; computed when it is read."""

    value: Callable[[], Any]


class Builder:
    """Collects steps, and carries some rows of numbers through them to know every shape."""

    def __init__(self, probes: Tensor) -> None:
        self.steps: list[Step] = []
        self.values = [probes]
        self.input = Flow(0, probes.ndim - 1)

    def shape(self, x: Flow) -> tuple[int, ...]:
        """Of one record."""
        return tuple(self.values[x.node].shape[1:])

    def add(self, make: Make, *inputs: Flow) -> Flow:
        """A new step."""
        value = make(Reader())(*(self.values[each.node] for each in inputs))
        refuse_unless(
            value.ndim >= 1 and len(value) == PROBES, "does not keep the records of a batch apart, as the first axis"
        )
        self.steps.append(Step(make, tuple(each.node for each in inputs)))
        self.values.append(value)
        return Flow(len(self.steps), value.ndim - 1)

    def keeping_shape(self, make: Make, x: Flow) -> Flow:
        """A new step that must not broadcast its input."""
        made = self.add(make, x)
        refuse_unless(self.shape(made) == self.shape(x), f"turns records of {self.shape(x)} into {self.shape(made)}")
        return made

    def move(self, function: Callable[[Tensor], Tensor], x: Flow) -> Flow:
        """A step that moves numbers, without computing any."""
        return self.add(lambda _: Moving(function), x)

    def reshape(self, x: Flow, function: Callable[[Tensor], Tensor]) -> Flow:
        """A step that keeps the order of numbers; only the record's shape of what `function` returns is used."""
        after = function(self.values[x.node])
        refuse_unless(len(after) == PROBES, "reshapes the batch")
        shape = after.shape[1:]
        return self.add(lambda _: Reshaping(lambda value: value.reshape(len(value), *shape)), x)

    def average(self, function: Callable[[Tensor], Tensor], x: Flow, terms: int) -> Flow:
        """A step that takes means of at most `terms` values."""
        return self.add(lambda _: Averaging(function, terms), x)

    def value(self, constant: Any) -> Any:
        """What it is now."""
        refuse_unless(not isinstance(constant, Flow), "depends on the input where only constants have bounds")
        return constant.value() if isinstance(constant, Constant) else constant

    def resolved(self, arguments: Any) -> Any:
        """Arguments of a call, however nested, with what constants are now."""
        return fx.node.map_aggregate(arguments, self.value)

    def tensor(self, constant: Any) -> Tensor:
        value = self.value(constant)
        refuse_unless(isinstance(value, (Tensor, int, float)), f"computes with a {type(value).__name__}")
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.values[0].dtype)

    def beside(self, x: Flow, read: Reader, constant: Any) -> Tensor:
        """A constant as it is combined with a record of `x`."""
        tensor = self.tensor(constant)
        if not tensor.is_floating_point():
            tensor = tensor.to(self.values[0].dtype)
        tensor = read(tensor.to(self.values[0].device))
        if tensor.ndim == x.rank + 1 and len(tensor) == 1:
            tensor = tensor[0]
        refuse_unless(tensor.ndim <= x.rank, "combines the records of a batch with different constants")
        return tensor
