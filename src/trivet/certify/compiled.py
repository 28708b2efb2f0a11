"""A compiled forward pass: for the many thousand passes of one sampling certificate."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trivet.models.surrogate import Logits, Surrogate


class _Compiled(NamedTuple):
    net: Surrogate
    shape: torch.Size
    run: Logits
    note: str


# Of a copy: compiled code holds on to its module, and a value that holds on to its key would never be freed.
_COMPILED: WeakKeyDictionary[Surrogate, _Compiled] = WeakKeyDictionary()


@torch.no_grad()
def compiled(net: Surrogate, example: Tensor) -> tuple[Logits, str]:
    """`net` with its present weights, compiled for inputs like `example` [B, ...]; later calls only copy the weights.

    Where the compiler fails, the second value says so and the first runs eagerly. That is settled before anything is
    counted, so that one run never mixes two arithmetics.
    """
    known = _COMPILED.get(net)
    if known is None or known.shape != example.shape:
        own = copy.deepcopy(net)
        known = _COMPILED[net] = _Compiled(own, example.shape, *_try(own, example))
    for ours, theirs in zip(_tensors(known.net), _tensors(net), strict=True):
        ours.copy_(theirs)
    return known.run, known.note


def _try(net: Surrogate, example: Tensor) -> tuple[Logits, str]:
    try:
        # fullgraph: a graph break or an exhausted recompile limit is an error here instead of a silent slow path.
        run: Callable[[Tensor], Tensor] = torch.compile(net, fullgraph=True, dynamic=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations are nothing a user can mend
            run(example)
    except Exception as error:  # compilers fail in many types; all of them are reported
        return net, f"eager, because torch.compile failed with {type(error).__name__}"
    return run, ""


def _tensors(net: Surrogate) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
