"""What a search is asked and what it answers: boxes with a conjunction each, four verdicts, and a clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from trivet.certify.vnnlib import Halfspace, Property, rounded
from trivet.errors import TrivetError, require

Answer = Literal["verified", "falsified", "unknown", "error"]


class UnsoundBound(TrivetError):
    """A lower bound that lies above a value of the network: a mistake in the verifier, of which nothing may be said."""


@dataclass(frozen=True)
class Witness:
    """A counterexample: an input in float32, and the outputs that the network's runtime gives for it."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """The answer to one question about a network and a property.

    Attributes:
        answer: "verified", there is no counterexample; "falsified", here is one; "unknown", the search ended before
            either; "error", the search itself failed, and nothing is said.
        reason: one sentence.
        arithmetic: of what evaluation of the network "verified" speaks, "real" or "float32" (which includes real).
        witness: with "falsified".
        timed_out: whether "unknown" is for want of time.
        boxes: how many parts of the input or of the network's behaviour were bounded.
        seconds: of wall time.
    """

    answer: Answer
    reason: str
    arithmetic: str
    boxes: int
    seconds: float
    witness: Witness | None = None
    timed_out: bool = False

    def __post_init__(self) -> None:
        require((self.witness is not None) == (self.answer == "falsified"), "a witness goes with falsified, alone.")


@dataclass(frozen=True, eq=False)
class Queries:
    """Boxes in each of which a conjunction of linear constraints on the outputs must be shown to be impossible.

    Attributes:
        lower: [Q, n] float64.
        upper: [Q, n].
        rows: [Q, S, m + 1]: outputs y meet constraint s of query q if <rows[q, s, :m], y> + rows[q, s, m] <= 0.
        used: [Q, S] bool; the other constraints only fill up, and are met by everything.
    """

    lower: Tensor
    upper: Tensor
    rows: Tensor
    used: Tensor

    @classmethod
    def of(cls, prop: Property) -> Queries:
        """One query for each case of the property and each of its conjunctions, in float64.

        Boxes and constants are rounded so that no counterexample is lost; coefficients are made whole numbers first,
        and so stay exact.

        Raises:
            TrivetError: numbers beyond the range of float64, or coefficients with too many digits for it.
        """
        asked = [(case.box(), conjunction) for case in prop.cases for conjunction in case.conjunctions]
        constraints = max((len(conjunction) for _, conjunction in asked), default=0)
        rows = torch.zeros(len(asked), constraints, prop.outputs + 1, dtype=torch.float64)
        used = torch.zeros(len(asked), constraints, dtype=torch.bool)
        for q, (_, conjunction) in enumerate(asked):
            for s, half in enumerate(conjunction):
                rows[q, s] = torch.tensor(_whole(half), dtype=torch.float64)
                used[q, s] = True
        ends = [torch.stack([box[end] for box, _ in asked]) if asked else torch.zeros(0, prop.inputs) for end in (0, 1)]
        finite = all(bool(each.isfinite().all()) for each in (*ends, rows))
        require(finite, "the property has numbers beyond the range of float64.")
        return cls(ends[0], ends[1], rows, used)

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, outputs: Tensor, query: Tensor) -> Tensor:
        """Of every constraint at outputs [B, m], for the query [B] each belongs to, [B, S]; met by all if <= 0."""
        rows = self.rows[query]
        values = (rows[:, :, :-1] @ outputs[:, :, None]).squeeze(2) + rows[:, :, -1]
        return values.where(self.used[query], -torch.inf)


@dataclass
class Search:
    """What all searches share: a deadline, and the test of points that look like counterexamples.

    Attributes:
        confirm: (query, point [n] float64) -> a witness, if the point, rounded to float32, is a counterexample beyond
            doubt.
        deadline: of `time.monotonic`.
        boxes: parts bounded so far.
    """

    confirm: Callable[[int, Tensor], Witness | None]
    deadline: float
    boxes: int = 0
    witness: Witness | None = field(default=None)

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def falsified(self, points: Tensor, query: Tensor, values: Tensor, tries: int = 3) -> bool:
        """Whether some of `points` [B, n] with `values` [B, S] is a counterexample; the most likely ones are tried."""
        worst = values.amax(1) if values.shape[1] else values.new_full((len(values),), -torch.inf)
        for at in worst.argsort()[:tries].tolist():
            if not worst[at] <= 0:
                break
            self.witness = self.confirm(int(query[at]), points[at])
            if self.witness is not None:
                return True
        return False


def _whole(half: Halfspace) -> list[float]:
    """The coefficients and the constant, times what makes the coefficients whole; the constant is rounded down."""
    factor = Fraction(math.lcm(*(each.denominator for each in half.coefficients)))
    factor /= math.gcd(*(int(each * factor) for each in half.coefficients))
    scaled = [int(each * factor) for each in half.coefficients]
    require(max(map(abs, scaled)) < 2**53, "a constraint's coefficients have too many digits for float64.")
    return [*map(float, scaled), rounded(half.constant * factor, -1)]


def least_value(slope: Tensor, constant: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """At most the least value of <slope, x> + constant over boxes, over the last axis; minus infinity if no number.

    The error of a sum of n products is at most gamma_n times the sum of their sizes (Higham 2002, section 3.1).
    """
    unit = 4 * (slope.shape[-1] + 64) * torch.finfo(slope.dtype).eps
    ends = torch.minimum(slope * lower, slope * upper)
    sizes = torch.maximum(lower.abs(), upper.abs()) * slope.abs()
    least = constant + ends.sum(-1) - unit * (sizes.sum(-1) + constant.abs())
    return least.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def shifted(constant: Tensor, by: Tensor) -> Tensor:
    """At most the sum of a bound's constant and that of a constraint."""
    return constant + by - 4 * torch.finfo(constant.dtype).eps * (constant.abs() + by.abs())


def refuse_above(least: Tensor, values: Tensor) -> None:
    """A lower bound must not lie above a value in its box.

    Raises:
        UnsoundBound: one does.
    """
    if bool((least > values + 1e-9 * (1 + values.abs())).any()):
        raise UnsoundBound("a lower bound lies above a value of the network: a bug in the verifier; please report it.")
