"""PGD on networks with a WNLL output layer: along its own gradients, and made for twins that do not saturate."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.methods import method
from trivet.models.wnll import THROUGH, Through, head_of, require_head
from trivet.threats.attack import Attack, Target
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import balls
from trivet.threats.threat import ThreatModel

STEPS, RESTARTS = 20, 5


@dataclass(frozen=True)
class _ThroughHead(PGD):
    through: Through = "exact"

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not isinstance(model.model, nn.Module):
            raise BadValue("this attack looks into the model, and was given a function.")
        require_head(model.model)
        twin = copy.deepcopy(model.model).eval().requires_grad_(False)
        require_head(twin).through = self.through
        return super().search(replace(model, gradients=twin), x, y, generator)


@method(title="WNLL-PGD", paper="Wang & Osher, 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class WnllPGD(_ThroughHead):
    """PGD that follows a WNLL head's own gradient; success is judged on the interpolated answer.

    The authors' attack is `through: surrogate`. Alone it says nothing about robustness, nor does the exact gradient,
    which vanishes where the interpolation saturates; an audit of such a network always adds the others.

    Attributes:
        steps, step_size, restarts, loss, random_start, samples: as for PGD.
        through: "exact", the implicit gradient of -log u, or "surrogate", the gradient at u with the Jacobian of the
            linear layer.
    """

    through: Literal["exact", "surrogate"] = "exact"


@method(title="WNLL transfer", legs="robust")
@dataclass(frozen=True)
class WnllTransfer(_ThroughHead):
    """PGD on a twin of a network with a WNLL head, tried on the network itself: masked gradients do not hinder it.

    Attributes:
        steps, step_size, restarts, loss, random_start, samples: as for PGD.
        through: "linear", the same network with its linear layer, or "soft", with all templates voting by distance.
    """

    gradient_free: ClassVar[bool] = True
    through: Literal["linear", "soft"] = "linear"


def wnll_battery(model: nn.Module, threat: ThreatModel) -> tuple[Attack, ...]:
    """What no report on a network with a WNLL head may leave out: each of the four, on each part of `threat`.

    Empty for other networks.
    """
    if head_of(model) is None:
        return ()
    kinds = {"exact": WnllPGD, "surrogate": WnllPGD, "linear": WnllTransfer, "soft": WnllTransfer}
    return tuple(
        kinds[through](member, STEPS, restarts=RESTARTS, through=through)
        for member in balls(threat)
        for through in THROUGH
    )
