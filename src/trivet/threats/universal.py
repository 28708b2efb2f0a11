"""Targeted universal perturbations (Hirano & Takemoto, 2019): one perturbation that sends most inputs to one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.models.surrogate import Logits
from trivet.threats.attack import Attack, Target, fooled, input_gradient
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel, batch_norms


class Universal(NamedTuple):
    """One perturbation for each of R target classes.

    Attributes:
        targets: [R] int64, the classes.
        deltas: [R, ...] the perturbations, inside the norm ball; `moved` adds them to inputs.
        success: [R] float64, the share of the records searched on, those of the class itself left out, that is sent to
            the class. Optimistic: `success_of` on other records is what a claim needs. 0 where there is no record.
    """

    targets: Tensor
    deltas: Tensor
    success: Tensor


@dataclass(frozen=True)
class UniversalSearch:
    """The search for targeted universal perturbations: what the attack and region adversarial training share.

    For each target t, over records x of other classes in random order, up to `passes` times:

        if f(clip(x + v)) != t:  up to `steps` times, until f(clip(x + v)) = t:
            v <- P( v - step_size direction(grad_x CE(z(clip(x + v)), t)) ),    P the projection on the ball,

    until the share sent to t reaches `enough`. Of all passes the best v is kept. Targets are searched in step with each
    other, each in an order of its own. The published loop (as in ART) steps without P and projects at the end, which
    can undo what was reached; projected at every step, the label is always that of the point returned. ART drops what
    did not reach t; here v keeps it.

    Attributes:
        threat: an l_inf or l_2 ball.
        targets: the classes; none given means all.
        passes: over the records; 0 leaves v = 0.
        steps: for each record.
        step_size: in input units; None means eps / (steps + 1).
        enough: the share at which a search stops, 1 - delta; 0.8 is ART's.
        top_fraction_by_margin: search on this share of the records alone, those nearest the boundary of the target by
            z_y - z_t: the critical part of its region.
    """

    threat: ThreatModel
    targets: tuple[int, ...] = ()
    passes: int = 10
    steps: int = 5
    step_size: float | None = None
    enough: float = 0.8
    top_fraction_by_margin: float = 1.0

    def __post_init__(self) -> None:
        known = self.threat.norm in ("Linf", "L2")
        require(known, f"threat={self.threat.norm} must be an l_inf or an l_2 ball: v is projected on it alone.")
        distinct = len(set(self.targets)) == len(self.targets) and min(self.targets, default=0) >= 0
        require(distinct, f"targets={list(self.targets)} must be distinct classes, none negative.")
        require(self.passes >= 0, f"passes={self.passes} must not be negative.")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.step_size is None or self.step_size >= 0, f"step_size={self.step_size} must not be negative.")
        require(0 < self.enough <= 1, f"enough={self.enough} must lie in (0, 1].")
        share = self.top_fraction_by_margin
        require(0 < share <= 1, f"top_fraction_by_margin={share} must lie in (0, 1].")

    def perturbations(self, ask: Logits, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Universal:
        """Search on records `x` [N, ...] with labels `y` [N]; `ask` maps inputs to logits, in eval mode."""
        with torch.no_grad():
            logits = ask(x)
        targets = self._classes(logits)
        pools = [self.critical(logits, y, int(target)) for target in targets]
        delta = x.new_zeros(len(targets), *x.shape[1:])
        best, success = delta.clone(), self._shares(ask, x, pools, targets, delta)
        for _ in range(self.passes):
            moving = [row for row, pool in enumerate(pools) if len(pool) and success[row] < self.enough]
            orders = {row: pools[row][_shuffled(len(pools[row]), x.device, generator)] for row in moving}
            for place in range(max(map(len, orders.values()), default=0)):
                rows = torch.tensor([row for row in moving if place < len(orders[row])], device=x.device)
                records = torch.stack([orders[row][place] for row in rows.tolist()])
                delta[rows] = self._pushed(ask, x[records], delta[rows], targets[rows])
            reached = self._shares(ask, x, pools, targets, delta)
            better = reached >= success  # of equals the later one: a v of 0 gives way even where nothing is reached
            best[better], success[better] = delta[better], reached[better]
        return Universal(targets, best, success)

    def critical(self, logits: Tensor, y: Tensor, target: int) -> Tensor:
        """Indices, in order, of the share of the records of other classes nearest the boundary of `target`."""
        others = (y != target).nonzero().squeeze(1)
        gap = (logits.gather(1, y[:, None]).squeeze(1) - logits[:, target])[others]
        nearest = gap.argsort(stable=True)[: math.ceil(self.top_fraction_by_margin * len(others))]
        return others[nearest.sort().values]

    def _classes(self, logits: Tensor) -> Tensor:
        count = logits.shape[1]
        require(max(self.targets, default=0) < count, f"targets={list(self.targets)} must be classes below {count}.")
        return torch.tensor(self.targets or range(count), device=logits.device)

    def _pushed(self, ask: Logits, x: Tensor, delta: Tensor, target: Tensor) -> Tensor:
        """Each perturbation [R, ...] after its steps on one record [R, ...] of its own."""
        length = self.threat.eps / (self.steps + 1) if self.step_size is None else self.step_size
        for _ in range(self.steps):
            point = self.threat.project(x + delta, x)
            gradient, _, logits = input_gradient(ask, point, lambda z: -cross_entropy(z, target))
            away = logits.argmax(1) != target
            if not bool(away.any()):
                break
            step = inside(self.threat, self.threat.ascend(delta, gradient, length))
            delta = torch.where(away.view(-1, *[1] * (x.ndim - 1)), step, delta)
        return delta

    def _shares(self, ask: Logits, x: Tensor, pools: Sequence[Tensor], targets: Tensor, deltas: Tensor) -> Tensor:
        each = [
            _share(ask, self.threat, x[pool], delta, target)
            for pool, target, delta in zip(pools, targets, deltas, strict=True)
        ]
        return torch.tensor(each, dtype=torch.float64, device=x.device)


@method(
    title="Targeted universal perturbation",
    paper="Hirano & Takemoto, 2019",
    year=2019,
    legs="robust",
    note="one perturbation for many records: weaker than any attack on each",
)
@dataclass(frozen=True)
class TargetedUniversal(UniversalSearch, Attack):
    """Find one perturbation for each target class on the records of a batch; of each record keep the worst of them.

    The perturbations are made from the very records they are tried on, so the accuracy left is that under an adversary
    who knows them; for one who does not, see `success_of`. It stands far above the accuracy left by PGD, and says
    nothing about it. Larger batches make perturbations that transfer better, and attack each record less.

    Digits, perceptron (128, 64), l_inf 0.3, searched on 100 training records in 3 passes: on test records of other
    classes they succeed in 74 to 76 % (mean of the ten targets; three networks), random signs as long in 0 to 2 %.
    """

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        best, most = x.clone(), torch.full(y.shape, -torch.inf, device=x.device)
        for delta in self.perturbations(model, x, y, generator).deltas:
            point = moved(self.threat, x, delta)
            with torch.no_grad():
                logits = model(point)
            value = cross_entropy(logits, y).float().masked_fill(fooled(logits, y), torch.inf)
            better = value > most
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), point, best)
            most = torch.maximum(most, value)
        return best


def moved(threat: ThreatModel, x: Tensor, delta: Tensor) -> Tensor:
    """clip(x + v), [B, ...], for one perturbation v [...]; points of S(x), to the last bit."""
    return threat.project(x + delta, x)


def success_of(found: Universal, ask: Logits, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """[R] float64: the share of the records of other classes that each perturbation sends to its class."""
    each = [
        _share(ask, threat, x[y != target], delta, target)
        for target, delta in zip(found.targets, found.deltas, strict=True)
    ]
    return torch.tensor(each, dtype=torch.float64, device=x.device)


def inside(threat: ThreatModel, delta: Tensor) -> Tensor:
    """Perturbations [R, ...] put into the norm ball, without regard to [0, 1]; no longer than eps, to the last bit."""
    unit = torch.finfo(delta.dtype).eps
    if threat.norm == "Linf":
        limit = max(threat.eps - unit / 2, 0.0)
        return delta.clamp(-limit, limit)
    inner = threat.eps * (1 - 16 * unit)
    return delta * (inner / batch_norms(delta, 2).clamp(min=max(inner, torch.finfo(delta.dtype).tiny)))


@torch.no_grad()
def _share(ask: Logits, threat: ThreatModel, x: Tensor, delta: Tensor, target: Tensor) -> float:
    if not len(x):
        return 0.0
    return float((ask(moved(threat, x, delta)).argmax(1) == target).double().mean())


def _shuffled(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(count, generator=generator, device=device)
