"""What a leak test found: a lower bound on epsilon, or an attack's success where false alarms are rare."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trivet.audit.counted import Counted


class RocPoint(BaseModel):
    """One threshold: the shares of non-members and of members that score above it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    fpr: float
    tpr: float


class LowFprPoint(BaseModel):
    """An attack held to few false alarms.

    Attributes:
        nominal: the false-positive rate asked for. The threshold is its quantile among one half of the non-members.
        fpr: what that threshold raises among the other half. tpr: among the members.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    nominal: float
    fpr: Counted
    tpr: Counted


class LeakFinding(BaseModel):
    """One leak test's result. It holds counts and rates only: no score, no canary, no record.

    Attributes:
        label: how tables call the test; spec: the test with every setting.
        access: what the attacker saw: the finished model's outputs, or also its weights.
        trained: models trained for the test.
        canaries: of what kind, and planted: how many of them (0: the attack was on ordinary records).
        guesses, right: how many memberships were guessed, and how many of these rightly.
        lower: epsilon is at least this, at `delta`, with `confidence`. None: the test bounds nothing.
        gaussian_lower: the same if the mechanism's trade-off curve is a Gaussian's, which is an assumption.
        low_fpr, roc: of a membership attack; the curve in order of false-positive rate.
        members, others: how many records of each kind were attacked.
        claimed: the epsilon claimed for the model, at `delta`; None if nothing is claimed.
        notes: what a reader must know before believing the figures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    label: str
    spec: dict[str, Any]
    access: Literal["black box", "white box"]
    trained: int
    seconds: float
    canaries: str = ""
    planted: int = 0
    guesses: int = 0
    right: int = 0
    lower: float | None = None
    delta: float | None = None
    confidence: float = 0.95
    gaussian_lower: float | None = None
    low_fpr: tuple[LowFprPoint, ...] = ()
    roc: tuple[RocPoint, ...] = ()
    members: int = 0
    others: int = 0
    claimed: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def contradicts(self) -> bool:
        """Whether the claim is refuted: more leaks than it allows, but for an event of probability 1 - confidence."""
        return self.lower is not None and self.claimed is not None and self.lower > self.claimed
