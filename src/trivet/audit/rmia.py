"""RMIA, the robust membership inference attack (Zarifzadeh, Liu & Shokri, ICML 2024)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.audit.leak_finding import LeakFinding
from trivet.audit.leak_test import LeakTest, Trainer, losses
from trivet.audit.membership import finding, train_shadows
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Splits
from trivet.errors import require
from trivet.methods import method, spec_of


@method(
    title="RMIA",
    paper="Zarifzadeh, Liu & Shokri, ICML 2024",
    year=2024,
    legs="private",
    note="an attack's success, no bound on epsilon",
)
@dataclass(frozen=True)
class Rmia(LeakTest):
    """Does the model favour this record over how a model without it would, more than it favours other people's?

    With p(x | theta) the model's probability of the record's label, and Pr(x) its average over models that saw the
    record and models that did not,

        score(x) = P_z [ (p(x | theta) / Pr(x)) / (p(z | theta) / Pr(z)) >= gamma ],

    the share of population records z, seen by nobody, that x beats. Offline, only shadow models that did not see x
    are used, and their average P_out stands in for Pr: ((1 + a) P_out + 1 - a) / 2, as if models that saw it said
    a P_out + 1 - a. For z, which no model saw, Pr is the plain average online, and the same formula offline.

    p is the softmax; the paper's image experiments use a Taylor softmax with margins and augmented queries. Works
    with few shadow models.

    Promised: the rates of this attack, at thresholds chosen on other records. Other attacks may do better, and
    these rates bound no epsilon.

    Attributes:
        shadows: models to train besides the attacked one, an even number.
        mode: "offline" or "online".
        a: between 0 (models that saw a record are certain of it) and 1 (they gain nothing).
        gamma: how much more x must be favoured than z.
        records: attack the first so many training records; population: compare with the first so many test records.
            None for all.
    """

    shadows: int = 4
    mode: str = "offline"
    a: float = 0.3
    gamma: float = 1.0
    records: int | None = None
    population: int | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require(
            self.shadows >= 2 and self.shadows % 2 == 0,
            f"shadows={self.shadows} must be even and at least 2: half of them see a record.",
        )
        require(self.mode in ("online", "offline"), f"mode={self.mode!r} must be 'online' or 'offline'.")
        require(0 <= self.a <= 1, f"a={self.a} must lie in [0, 1].")
        require(self.gamma > 0, f"gamma={self.gamma} must be positive.")
        require(self.records is None or self.records >= 4, f"records={self.records} must be at least 4.")
        require(self.population is None or self.population >= 1, f"population={self.population} must be at least 1.")
        require(0 < self.confidence < 1, f"confidence={self.confidence} must lie strictly between 0 and 1.")

    def run(self, trainer: Trainer, data: Splits, *, seed: int, claimed: PrivacyClaim | None = None) -> LeakFinding:
        began = time.perf_counter()
        pool, population = data.train.select(slice(0, self.records)), data.test.select(slice(0, self.population))
        found = train_shadows(
            trainer,
            pool,
            self.shadows,
            seed,
            lambda model: torch.cat([-losses(model, pool), -losses(model, population)]).exp(),
            "RMIA",
        )
        n = len(pool)
        scores = self.scores(found.target[:n], found.signal[:, :n], found.inside, found.target[n:], found.signal[:, n:])
        return finding(
            scores,
            found,
            label=f"RMIA ({self.mode})",
            spec=spec_of(self),
            confidence=self.confidence,
            seed=seed,
            seconds=time.perf_counter() - began,
            claimed=claimed,
        )

    def scores(self, x: Tensor, x_shadow: Tensor, inside: Tensor, z: Tensor, z_shadow: Tensor) -> Tensor:
        """[N] in [0, 1], larger for members.

        Args:
            x, z: [N] and [M] probabilities from the attacked model.
            x_shadow, inside: [S, N] from the shadow models, and who of them saw x. z_shadow: [S, M].
        """
        without = (x_shadow * ~inside).sum(0) / (~inside).sum(0)
        if self.mode == "offline":
            prior_x, prior_z = self._prior(without), self._prior(z_shadow.mean(0))
        else:
            prior_x, prior_z = ((x_shadow * inside).sum(0) / inside.sum(0) + without) / 2, z_shadow.mean(0)
        # Ratios of ratios, all at once: x beats those z whose own ratio, gamma times, is at most its.
        smallest = torch.finfo(torch.float64).tiny
        ours, theirs = x / prior_x.clamp_min(smallest), self.gamma * z / prior_z.clamp_min(smallest)
        return torch.searchsorted(theirs.sort().values, ours, side="right").double() / len(z)

    def _prior(self, without: Tensor) -> Tensor:
        return ((1 + self.a) * without + 1 - self.a) / 2
