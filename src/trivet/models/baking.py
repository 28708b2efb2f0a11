"""Weights that are computed from others (masked, quantised, factorised), made plain at their present value."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

Chain = parametrize.ParametrizationList


def bake(model: nn.Module, which: Callable[[Chain], bool] = lambda _: True) -> None:
    """Replace, in place, the parametrized tensors of `model` whose chains `which` chooses by plain parameters."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        # A copy shares its class with the original, and removal takes the tensor's property off that class.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for name, chain in list(module.parametrizations.items()):  # type: ignore[operator, union-attr]
            if which(chain):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def baked(model: nn.Module) -> nn.Module:
    """A copy of `model` without parametrizations, but for those that draw; `model` stays as it is."""
    made = copy.deepcopy(model)
    bake(made, lambda chain: not _draws(chain))
    return made


def draws(model: nn.Module) -> bool:
    """Whether a parametrized tensor of `model` is another one in every pass."""
    return any(_draws(module) for module in model.modules() if isinstance(module, Chain))


def _draws(chain: Chain) -> bool:
    return any(getattr(step, "randomised", False) for step in chain)
