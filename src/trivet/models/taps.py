"""Taps: what a layer inside a network hands on, read during an ordinary forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trivet.errors import require

Read = Callable[[], Tensor]


@contextmanager
def tapped(model: nn.Module, at: str = "") -> Iterator[Read]:
    """Inside, a call of what is yielded returns what the tapped layer handed on in the latest forward pass of `model`.

        with tapped(model, "features.3") as features:
            logits = model(x)
            z = features()  # attached to the graph of that pass

    Args:
        model: any module; also when called through `torch.func.functional_call`, and under `torch.func.vmap`.
        at: the name of a submodule, whose output is read; "" for the penultimate representation: what the last linear
            layer is given, [B, D].

    Raises:
        BadValue: no such submodule, no linear layer, or (from the call) a pass that did not reach the layer.
    """
    layers = dict(model.named_modules())
    require(not at or at in layers, f"at={at!r} must name a layer of the model: {', '.join(filter(None, layers))}.")
    found: list[Any] = []

    def read() -> Tensor:
        require(bool(found), f"the tapped layer {at or 'before the last linear one'} took no part in the pass.")
        value: Tensor = found[0]
        return value

    def keep_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[:] = inputs[:1]

    def keep_output(_: nn.Module, __: Any, output: Any) -> None:
        found[:] = [output]

    if at:
        hook = layers[at].register_forward_hook(keep_output)
    else:
        hook = last_linear(model).register_forward_pre_hook(keep_input)
    try:
        yield read
    finally:
        hook.remove()


def last_linear(model: nn.Module) -> nn.Linear:
    """The linear layer registered last: in a classifier, the one that makes the logits.

    Raises:
        BadValue: there is none.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    require(bool(linear), "the model has no linear layer; name the layer to tap.")
    return linear[-1]
