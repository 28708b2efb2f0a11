"""PGD towards the classes that a hierarchy puts farthest from the label: how severe a mistake can be forced."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trivet.data.hierarchy import Hierarchy
from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.threats.targeting import Tries, try_aims


@method(
    title="Hierarchy-targeted PGD",
    paper="Abreu, Vaska & Helus, arXiv 2022",
    year=2022,
    legs="robust",
    note="reconstruction: the order of the targets is ours",
)
@dataclass(frozen=True)
class HierarchyPGD(Attack):
    """For each point, targeted PGD on one wrong class after another in the order of D, the hierarchy's distance.

    `dissimilar` begins with the classes farthest from the label and asks for the most severe mistake it can force,
    `similar` begins with the nearest and asks for the mildest. Among classes as far, the likelier comes first. Each
    try descends CE(z(x'), t) from a random point of the set. A point is done when it is classified as a class at
    least as far (as near) as the target; else its best misclassification is kept. Any of them is an adversarial
    example, so that the accuracy left is an upper bound, as of every attack; that its mistakes are severe is what it
    was made for, and says nothing about the mistakes of other attacks.

    Attributes:
        hierarchy: the tree of the classes.
        towards: "dissimilar" or "similar".
        steps: gradient steps of each try.
        step_size: in input units; None means 2.5 eps / steps.
        targets: at most so many classes are tried for a point.
        samples: forward passes averaged per gradient, for randomised models.
    """

    hierarchy: Hierarchy = field(kw_only=True)
    towards: Literal["dissimilar", "similar"] = "dissimilar"
    steps: int = 20
    step_size: float | None = None
    targets: int = 9
    samples: int = 1

    def __post_init__(self) -> None:
        known = ("dissimilar", "similar")
        require(self.towards in known, f"towards={self.towards!r} must be one of: {', '.join(known)}.")
        for name in ("steps", "targets", "samples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        require(self.step_size is None or self.step_size >= 0, f"step_size={self.step_size} must not be negative.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            logits = model(x)
        worth = self._worth(logits)[y]
        # Sorted by likelihood first; the second sort keeps that order among equals.
        wrong = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
        order = worth.gather(1, wrong).argsort(dim=1, descending=True, stable=True)
        return try_aims(model, x, y, wrong.gather(1, order)[:, : self.targets], partial(self._climb, model, generator))

    def _worth(self, logits: Tensor) -> Tensor:
        """[K, K]: how much a mistake of one class for another is asked for, above 0."""
        apart = self.hierarchy.distances.to(logits.device)
        named, classes = len(apart), logits.shape[1]
        require(named == classes, f"hierarchy=… must be of the model's {classes} classes, not of {named}.")
        return apart if self.towards == "dissimilar" else self.hierarchy.height + 1 - apart

    def _climb(
        self, model: Target, generator: torch.Generator | None, x: Tensor, y: Tensor, aim: Tensor, owner: Tensor
    ) -> Tries:
        found = ascend(
            model,
            x,
            self.threat.random_start(x, generator),
            lambda logits: -cross_entropy(logits, aim),
            threat=self.threat,
            steps=self.steps,
            step_size=2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size,
            samples=self.samples,
        )
        with torch.no_grad():
            logits = model.model(found)
        worth = self._worth(logits)
        said = logits.argmax(1)
        reached = worth[y, said].where(said != y, 0)
        # Below every mistake: how little the target lacks, at most 0.
        short = (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])).squeeze(1).clamp(max=0)
        return Tries(found, reached >= worth[y, aim], torch.where(reached > 0, reached.to(short.dtype), short))
