"""What an audit found about the severity of mistakes, by a hierarchy of the classes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from trivet.audit.counted import Counted


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Mistakes(_Record):
    """The mistakes of one condition, among all audited records.

    Attributes:
        label: "no attack", an attack's label, or "all attacks, the first that succeeded".
        aimed: whether an attack that looks for severe mistakes had a part in it, which then says what can be forced
            and not what usually happens.
        error: share of records answered wrong; those wrong without attack keep that answer.
        by_height: how many of the mistakes have D = 1, 2, …, up to the tree's height.
        severity: mean of D over the mistakes; None if there is none.
        interval: exact and conservative, at the audit's confidence: severity = 1 + sum over h >= 2 of P(D >= h), and
            each of these rates has its Clopper-Pearson interval at its share of the error probability.
        hdist: mean of D over all records, 0 where right: error times severity.
    """

    label: str
    aimed: bool
    error: Counted
    by_height: tuple[int, ...]
    severity: float | None
    interval: tuple[float, float] | None
    hdist: float


class Ranked(_Record):
    """Of the k classes with the largest logits, without attack (Bertinetto et al., CVPR 2020).

    Attributes:
        hdist: mean over records of the mean of D over the k classes. best: of its least.
        mistakes: as hdist, over the records whose first class is wrong; None if there is none.
        hprecision: mean over records of the sum of 1 - D / height over the k classes, as a share of the greatest sum
            that k classes can have for that label. hmap: mean of hprecision over 1, …, k.
    """

    k: int
    hdist: float
    best: float
    mistakes: float | None
    hprecision: float
    hmap: float


class SeverityFinding(_Record):
    """How severe the mistakes are; the hierarchy is among the audit's settings.

    Attributes:
        height: the greatest D. chance: mean D of mistakes made uniformly at random, for reference.
        conditions: without attack, under each attack that could run, and under all of them.
    """

    height: int
    chance: float
    conditions: tuple[Mistakes, ...]
    ranked: tuple[Ranked, ...]
