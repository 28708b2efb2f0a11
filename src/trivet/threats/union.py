"""Unions of threat models: the adversary chooses the type of perturbation, too (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.threats.attack import Attack, Target
from trivet.threats.rotation_translation import RotationTranslation, RotationTranslationSearch
from trivet.threats.threat import ThreatModel


@method(title="Union of threat models", paper="Tramer & Boneh, NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Union(ThreatModel):
    """S(x) = S_1(x) u ... u S_k(x). A point is robust if it stands against every type.

    `project` goes to the nearest of the members' projections, which is the Euclidean projection on the union wherever
    theirs are. There is no one direction of ascent: attacks on a union are attacks on its members (`over_members`),
    and those that follow gradients refuse the union itself.

    Attributes:
        threats: the members; unions among them are taken apart.
        eps: multiplies the radius of every member; 1 leaves them as given.
    """

    threats: tuple[ThreatModel, ...]
    eps: float = 1.0
    norm: ClassVar[str] = "union"

    def __post_init__(self) -> None:
        require(len(self.threats) >= 1, f"threats={list(self.threats)} must name one threat model at least.")
        require(0 <= self.eps < math.inf, f"eps={self.eps} must be a finite number, not negative.")
        require(len(self.members) > 0, f"threats={list(self.threats)} must hold threat models.")

    @property
    def members(self) -> tuple[ThreatModel, ...]:
        sized = (each if self.eps == 1 else each.scaled(self.eps) for each in self.threats)
        return tuple(member for each in sized for member in each.members)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        points = torch.stack([member.project(x_adv, x) for member in self.members])
        apart = (points.double() - x_adv.double()).square().flatten(2).sum(2)
        return points[apart.argmin(0), torch.arange(len(x), device=x.device)]

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of a member that is drawn for each record."""
        points = torch.stack([member.random_start(x, generator) for member in self.members])
        chosen = torch.randint(len(points), (len(x),), generator=generator, device=x.device)
        return points[chosen, torch.arange(len(x), device=x.device)]

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        raise BadValue(
            "a union of threats has no one direction of ascent; attack its members one by one, and train with "
            "max_at or avg_at."
        )

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return torch.stack([member.contains(x_adv, x) for member in self.members]).any(0)


@dataclass(frozen=True)
class WorstOf(Attack):
    """Several attacks in turn, each on what still stands: how a union is attacked.

    Every find is judged by the attack that made it; what it does not accept is replaced by the input.

    Attributes:
        attacks: each with a threat of its own, inside `threat`.
    """

    attacks: tuple[Attack, ...]

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for attack in self.attacks:
            found = attack.search(model, x[open_], y[open_], generator)
            won = attack.succeeds(model, found, x[open_], y[open_])
            best[open_[won]], open_ = found[won], open_[~won]
            if not len(open_):
                break
        return best

    def succeeds(self, model: Target, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # `search` returns the input or what the attack that made it found to be in its set.
        return model.misclassifies(x_adv, y)


def over_members(threat: ThreatModel, attack: Callable[[ThreatModel], Attack], draws: int | None = None) -> Attack:
    """`attack(threat)`; of a union the worst of `attack(member)`. Rotations are tried, all of them or `draws`."""
    made = tuple(
        RotationTranslationSearch(member, draws) if isinstance(member, RotationTranslation) else attack(member)
        for member in threat.members
    )
    return made[0] if len(made) == 1 else WorstOf(threat, made)
