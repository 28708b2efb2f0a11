"""The sets of inputs that bounds are about, and what is carried through a network: an interval for every value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.rounding import LARGEST, Rounding, gamma
from trivet.errors import BadValue, require

Norm = Literal["Linf", "L2", "L1"]


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Values that are the inputs, one by one scaled and shifted: value = gain (x' - x) + centre, up to `error`.

    Here the shape of the ball is still known; the first layer that mixes inputs uses it (dual norm) and ends it.
    All are [B, ...].
    """

    centre: Tensor
    gain: Tensor
    error: Tensor
    eps: Tensor
    norm: Norm


class Interval:
    """For B inputs: every value lies between `lower` and `upper` [B, ...].

    Held by its ends or by middle and radius, as a layer gives it; the other two are computed when asked for.
    """

    def __init__(self, lower: Tensor, upper: Tensor, diagonal: Diagonal | None = None) -> None:
        self.lower, self.upper, self.diagonal = lower, upper, diagonal

    @classmethod
    def around(cls, middle: Tensor, radius: Tensor, diagonal: Diagonal | None = None) -> Interval:
        return _Around(middle, radius, diagonal)

    @property
    def shape(self) -> torch.Size:
        return self.lower.shape

    @cached_property
    def middle(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @cached_property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2

    @cached_property
    def size(self) -> Tensor:
        """The largest absolute value."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def intersect(self, other: Interval) -> Interval:
        """Both are true; an end of `other` that is not a finite number is passed over."""
        lower = other.lower.where((other.lower > self.lower) & other.lower.isfinite(), self.lower)
        upper = other.upper.where((other.upper < self.upper) & other.upper.isfinite(), self.upper)
        # Without error terms the ends of a point may pass each other by a rounding.
        return Interval(lower, torch.maximum(lower, upper), self.diagonal)

    def on(self, signs: Tensor) -> Interval:
        """The part on the positive side of 0 where `signs` [B, ...] are 1, on the negative where they are -1."""
        lower = self.lower.clamp(min=0.0).where(signs > 0, self.lower)
        upper = self.upper.clamp(max=0.0).where(signs < 0, self.upper)
        # Where nothing is left any interval is true; one in order spares everybody else the question.
        return Interval(torch.minimum(lower, upper), torch.maximum(lower, upper), self.diagonal)

    def checked(self, rounding: Rounding | None) -> Interval:
        """Unknown, in both directions, where evaluation in float32 might leave its range."""
        if rounding is None:
            return self
        known = (self.lower > -LARGEST) & (self.upper < LARGEST)  # false for NaN, too
        return Interval(self.lower.where(known, -math.inf), self.upper.where(known, math.inf), self.diagonal)

    def least(self, rows: Tensor, rounding: Rounding | None) -> Tensor:
        """A lower bound of <row, value> over the box, [B, S] for rows [B or 1, S, ...]; attained up to rounding."""
        rows = rows.flatten(2)
        radius = self.spread(rounding, rows.shape[2])
        if rounding is None and len(rows) == 1:  # the same for all
            return F.linear(self.middle.flatten(1), rows[0]) - F.linear(radius.flatten(1), rows[0].abs())
        return (rows @ _column(self.middle) - rows.abs() @ _column(radius)).squeeze(2)

    def spread(self, rounding: Rounding | None, count: int) -> Tensor:
        """The radius, widened by the errors of adding up `count` products with middle and radius."""
        return self.radius if rounding is None else self.radius + gamma(2 * count + 64, rounding.ours) * self.size


class _Around(Interval):
    """Held by middle and radius."""

    def __init__(self, middle: Tensor, radius: Tensor, diagonal: Diagonal | None) -> None:
        self.middle, self.radius, self.diagonal = middle, radius, diagonal

    @property
    def shape(self) -> torch.Size:
        return self.middle.shape

    @cached_property
    def lower(self) -> Tensor:  # type: ignore[override]
        return self.middle - self.radius

    @cached_property
    def upper(self) -> Tensor:  # type: ignore[override]
        return self.middle + self.radius


def _column(values: Tensor) -> Tensor:
    return values.flatten(1)[:, :, None]


class Domain(ABC):
    """A set of inputs for each of B records."""

    @abstractmethod
    def __len__(self) -> int:
        """B."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers that describe it."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Domain:
        """The same set, described in another type."""

    @abstractmethod
    def __getitem__(self, records: slice) -> Domain:
        """The sets of some of the records."""

    @abstractmethod
    def check(self) -> None:
        """Asked before anything is proved. In training it is not: it waits for the device, and vmap does not allow it.

        Raises:
            BadValue: numbers that describe no set, or another than can be meant.
        """

    @abstractmethod
    def interval(self, rounding: Rounding | None) -> Interval:
        """A box around the set."""

    def least(self, rows: Tensor, rounding: Rounding | None) -> Tensor:
        """A lower bound of <row, x'> over the set, [B, S] for rows [B, S, ...]."""
        return self.interval(rounding).least(rows, rounding)


@dataclass(frozen=True, eq=False)
class Box(Domain):
    """{ x' : lower <= x' <= upper } for each of B inputs; both are [B, ...], and any finite box will do."""

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.lower.shape), tuple(self.upper.shape)
        require(shapes[0] == shapes[1], f"lower has shape {shapes[0]} and upper {shapes[1]}; give one of each.")

    def check(self) -> None:
        """The ends must be finite, and in order."""
        # Written so that NaN is refused, too.
        if not bool(((self.lower > -math.inf) & (self.lower <= self.upper) & (self.upper < math.inf)).all()):
            raise BadValue("a box must have finite ends, and its lower must not lie above its upper.")

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def dtype(self) -> torch.dtype:
        return self.lower.dtype

    def __getitem__(self, records: slice) -> Box:
        return Box(self.lower[records], self.upper[records])

    def to(self, dtype: torch.dtype) -> Box:
        return self if dtype == self.dtype else Box(self.lower.to(dtype), self.upper.to(dtype))

    def interval(self, rounding: Rounding | None) -> Interval:
        return Interval(self.lower, self.upper)


@dataclass(frozen=True, eq=False)
class Ball(Domain):
    """{ x' in [low, high]^D : ||x' - x||_p <= eps } for each of B inputs.

    Attributes:
        x: [B, ...].
        eps: [B], of the same type.
        norm: "Linf", "L2" or "L1".
        clip: (low, high), where inputs lie in any case; None for nothing known.
    """

    x: Tensor
    eps: Tensor
    norm: Norm = "Linf"
    clip: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        require(self.norm in ("Linf", "L2", "L1"), f"norm={self.norm!r} must be 'Linf', 'L2' or 'L1'.")
        require(self.eps.shape == self.x.shape[:1], f"eps must be [{len(self.x)}], got {tuple(self.eps.shape)}.")

    def check(self) -> None:
        """Inputs must lie in `clip`, and be finite without it; radii must not be negative."""
        low, high = self.clip or (-torch.finfo(self.x.dtype).max, torch.finfo(self.x.dtype).max)
        # Written so that NaN, which is the least and the largest value of any it is among, is refused, too.
        least, most = self.x.aminmax() if self.x.numel() else (low, high)
        if not (bool(least >= low) and bool(most <= high)):
            raise BadValue(
                f"inputs must lie in [{low:g}, {high:g}]; normalisation belongs into the model, and other domains are "
                "given by `clip`."
            )
        if not bool(((self.eps >= 0) & (self.eps < math.inf)).all()):
            raise BadValue("eps must be finite and not negative.")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def __getitem__(self, records: slice) -> Ball:
        return Ball(self.x[records], self.eps[records], self.norm, self.clip)

    def to(self, dtype: torch.dtype) -> Ball:
        if dtype == self.dtype:
            return self
        return Ball(self.x.to(dtype), self.eps.to(dtype), self.norm, self.clip)

    def interval(self, rounding: Rounding | None) -> Interval:
        """The smallest box around the ball: an lp ball lies in the Linf ball of its radius."""
        eps = self.eps.view(-1, *[1] * (self.x.ndim - 1))
        lower, upper = self.x - eps, self.x + eps
        if rounding is not None:
            lower, upper = (
                end.nextafter(torch.full_like(end, to)) for end, to in ((lower, -math.inf), (upper, math.inf))
            )
        if self.clip is not None:
            lower, upper = lower.clamp(min=self.clip[0]), upper.clamp(max=self.clip[1])
        diagonal = None
        if self.norm != "Linf":
            diagonal = Diagonal(self.x, torch.ones_like(self.x), torch.zeros_like(self.x), self.eps, self.norm)
        return Interval(lower, upper, diagonal)

    def least(self, rows: Tensor, rounding: Rounding | None) -> Tensor:
        """The better of the dual norm over the ball, <row, x> - eps ||row||_q, and the exact minimum over the box."""
        over_box = super().least(rows, rounding)
        if self.norm == "Linf":
            return over_box
        flat, x = rows.flatten(2), _column(self.x)
        slack = gamma(2 * flat.shape[2] + 64, rounding.ours) if rounding else 0.0
        reach = self.eps[:, None] * dual_norm(flat, self.norm) * (1 + slack)
        over_ball = (flat @ x).squeeze(2) - reach * (1 + slack)
        if rounding is not None:
            over_ball = over_ball - slack * (flat.abs() @ x.abs()).squeeze(2)
        return torch.maximum(over_box, over_ball)


def dual_norm(rows: Tensor, norm: Norm) -> Tensor:
    """||row||_q over the last axis, 1/p + 1/q = 1 for the p of an "L2" or "L1" ball."""
    return torch.linalg.vector_norm(rows, dim=-1) if norm == "L2" else rows.abs().amax(-1)
