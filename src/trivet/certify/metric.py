"""Certificates of K nearest neighbours under a Mahalanobis distance (Wang et al., "Provably Robust Metric Learning",
NeurIPS 2020): a lower bound in closed form for every K, and the exact smallest change for K = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trivet.certify.certifier import Certificates, Certifier
from trivet.certify.half_spaces import Projection, smallest_move
from trivet.display import Advance
from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.models.mahalanobis_knn import MahalanobisKnn

Array = NDArray[np.float64]

_BLOCK = 64  # points of other classes that are compared with all of the same class at once
_QUERIES = 256  # inputs whose distances are computed together
_SCREEN = 10  # nearest points of the same class that a first, cheap bound looks at
_UNIT = 2.0**-53  # half the distance from 1 to the next float64
_STEPS_INSIDE = np.array([0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0])  # of the way from the boundary to the other point


@method(
    title="Certificate of K nearest neighbours",
    name="metric",
    paper="Wang et al., NeurIPS 2020",
    year=2020,
    legs="robust",
)
@dataclass(frozen=True)
class MetricCertificate(Certifier):
    """No change of l_2 norm below the radius changes the answer of a `MahalanobisKnn`.

    With d_M(a, b) = (a - b)^T M (a - b), M = G^T G, the smallest change after which z is as near to x- as to x+ is the
    distance to a half-space,

        e(x+, x-, z) = max(0, d_M(z, x-) - d_M(z, x+)) / (2 || M (x+ - x-) ||_2).

    Let y be the answer, K = 2k - 1. To lose y, k points of other classes must each come as near as all but k - 1
    points of class y, so

        radius(z) = k-th smallest over x- not of class y, of the k-th largest over x+ of class y, of e(x+, x-, z)

    is a lower bound, for any number of classes and however ties are broken. All points are looked at, unless a cheaper
    lower bound shows that they cannot matter. Answers with fewer than k votes have radius 0.

    With `exact` (K = 1 only), the set where x- beats all of class y is a polyhedron, and the distance to the nearest
    one is the smallest change itself: a quadratic programme for each x- that earlier ones do not exclude
    (`half_spaces`). Its multipliers prove the radius; its solution, verified with the model, is an adversarial example,
    whose distance is the evidence `flip`. The two agree but for rounding, unless a solver gives up. The paper solves
    the same programmes by coordinate descent.

    Radii are in the units of the inputs given, which may lie anywhere: for features of a network they are radii in
    feature space. Rounding is accounted for: a priori error bounds of these computations and of the model's own
    float64 distances, in whatever order sums are taken, are subtracted. They grow with the square of the inputs' size:
    columns that lie farther from 0 than they vary, by 1e4 times or more, should be centred first.

    Attributes:
        exact: compute the exact radius; K must be 1.
    """

    exact: bool = False

    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int = 0, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """Certificates for `x` [N, ...], finite, not only in [0, 1]. Without randomness: `seed` is ignored.

        Raises:
            BadValue: a model that is no `MahalanobisKnn`, `exact` with K > 1, or a model that can hardly give more than
                one answer, having fewer than k points of all other classes.
        """
        if not isinstance(model, MahalanobisKnn):
            raise BadValue(f"a {type(model).__name__} is no MahalanobisKnn; metric certificates are about those alone.")
        require(not self.exact or model.k == 1, f"exact=True needs k=1, the model has k={model.k}; use the bound.")
        require(bool(x.isfinite().all()), "inputs must be finite.")
        index = torch.arange(len(x)) if index is None else index.cpu()
        require(index.shape == (len(x),), f"index must be [{len(x)}] like the inputs, got {tuple(index.shape)}.")
        labels = torch.empty(len(x), dtype=torch.int64)
        radii, flips = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
        for row, query in enumerate(_queries(model, x)):
            labels[row] = query.label
            if self.exact:
                found = query.exact(model)
                radii[row], flips[row] = found.distance, found.flip
            else:
                radii[row] = query.bound(model.k)
            if advance:
                advance(1)
        return Certificates(index, labels, radii, "L2", 0.0, _conditions(model), {"flip": flips} if self.exact else {})

    def follows(self, certificates: Certificates) -> bool:
        if not self.exact:
            return not certificates.evidence
        flip = certificates.evidence.get("flip")
        return flip is not None and bool((certificates.radii <= flip).all())


def nearest_flips(model: MahalanobisKnn, x: Tensor) -> Tensor:
    """For each of `x` [N, ...] the nearest input with another answer: the optimal attack on 1-NN, l_2, unconstrained.

    Verified with the model; no farther than the exact radius but for rounding. It may leave [0, 1]. Where the nearest
    change is a tie that the model happens to win, because two points of different classes coincide under the metric,
    the tie is returned.

    Raises:
        BadValue: K > 1, or points of one class only.
    """
    require(model.k == 1, f"the optimal attack needs k=1, the model has k={model.k}.")
    moved = [query.exact(model).witness for query in _queries(model, x)]
    return torch.from_numpy(np.array(moved).reshape(len(x), -1)).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Reference:
    """What all queries share.

    Attributes:
        points: [N, D], x.
        pulled: [N, D], M x: gradients of differences of distances are differences of these.
        squares: [N], || M x ||^2.
        labels: [N].
        reach: max over the points of || |G| |x| ||_2, in which errors of distances are measured.
        size: the Frobenius norm of G.
        pulled_error: bound on the l_2 error of 2 (M x - M x'), as computed from `pulled`.
        square_error: the same of || M x - M x' ||^2, expanded.
    """

    points: Array
    pulled: Array
    squares: Array
    labels: NDArray[np.int64]
    reach: float
    size: float
    pulled_error: float
    square_error: float

    @classmethod
    def of(cls, model: MahalanobisKnn) -> Reference:
        points, factor = _numpy(model.points), _numpy(model.factor)
        pulled = points @ factor.T @ factor
        stretched = np.abs(points) @ np.abs(factor).T
        largest = _longest(stretched @ np.abs(factor))
        n = max(factor.shape)
        return cls(
            points,
            pulled,
            np.einsum("ij,ij->i", pulled, pulled),
            model.labels.cpu().numpy(),
            _longest(stretched),
            float(np.linalg.norm(factor)),
            16 * (n + 8) * _UNIT * largest,
            16 * (n + 8) * _UNIT * largest**2,
        )

    def steepness(self, others: NDArray[np.int64], own: NDArray[np.int64]) -> Array:
        """2 || M (x+ - x-) ||_2 for all pairs [others, own], rounded up."""
        squares = self.squares[others][:, None] + self.squares[own] - 2 * self.pulled[others] @ self.pulled[own].T
        return 2 * np.sqrt(np.maximum(squares, 0) + self.square_error) + self.pulled_error


@dataclass(frozen=True, eq=False)
class Flip:
    """The smallest change of answer: `distance`, proved; `flip` >= `distance`, that of `witness` [D], which does it."""

    distance: float
    flip: float
    witness: Array


@dataclass(frozen=True, eq=False)
class Query:
    """One input z [D] among the points.

    Attributes:
        label: the model's answer y.
        own, others: the points of class y and of all other classes, nearest first.
        distances: [N], d_M(z, x).
        slack: by how much two distances must differ for their order to be certain, for z and for all inputs at which a
            certificate could matter.
    """

    z: Array
    reference: Reference
    label: int
    own: NDArray[np.int64]
    others: NDArray[np.int64]
    distances: Array
    slack: float

    @classmethod
    def of(cls, model: MahalanobisKnn, reference: Reference, z: Array, distances: Array, label: int) -> Query:
        majority = (model.k + 1) // 2
        order = np.argsort(distances, kind="stable")
        same = reference.labels[order] == label
        own, others = order[same], order[~same]
        require(
            len(others) >= majority,
            f"{len(others)} points are not of class {label}, fewer than {majority}: the answer of {model.k} neighbours "
            "cannot change, which is no property of the metric; add points of other classes.",
        )
        # At x- itself no point is nearer than x-, so e(x+, x-, z) <= || x- - z ||_2 for every x+: no radius reaches
        # beyond the k-th nearest of the others.
        away = np.partition(np.linalg.norm(reference.points[others] - z, axis=1), majority - 1)[majority - 1]
        factor = _numpy(model.factor)
        span = float(np.linalg.norm(np.abs(factor) @ np.abs(z))) + reference.size * float(away) + reference.reach
        # Each distance errs by at most 4 (n + 2) u span^2: two at z, in the certificate, and two where it holds, in
        # the model; twice that covers sums over multipliers.
        slack = 32 * (max(factor.shape) + 32) * _UNIT * span**2
        return cls(z, reference, label, own, others, distances, slack)

    def moves(self, others: NDArray[np.int64], own: NDArray[np.int64]) -> Array:
        """e(x+, x-, z) for all pairs [others, own], rounded down."""
        ahead = self.distances[others][:, None] - self.distances[own] - self.slack
        return np.maximum(ahead, 0) / self.reference.steepness(others, own)

    def screened(self, majority: int) -> tuple[NDArray[np.int64], Array]:
        """The others in order of a lower bound of the move that each needs, and these bounds: from few own points."""
        few = self.own[: majority + _SCREEN]
        bounds = np.concatenate(
            [_largest(self.moves(some, few), majority) for some in _blocks(self.others, 16 * _BLOCK)]
        )
        order = np.argsort(bounds, kind="stable")
        return self.others[order], bounds[order]

    def bound(self, k: int) -> float:
        """The radius of K nearest neighbours, K = `k`; 0 where less than half the votes are for the answer."""
        majority = (k + 1) // 2
        if len(self.own) < majority:
            return 0.0
        others, screen = self.screened(majority)
        found: Array = np.empty(0)
        for start in range(0, len(others), _BLOCK):
            if len(found) == majority and screen[start] >= found[-1]:
                break
            needed = _largest(self.moves(others[start : start + _BLOCK], self.own), majority)
            found = np.sort(np.concatenate([found, needed]))[:majority]
        return float(found[-1])

    def exact(self, model: MahalanobisKnn) -> Flip:
        """The smallest change of the answer of one nearest neighbour."""
        others, screen = self.screened(1)
        # The nearest of the others is an adversarial example from the start, and all there is where no solver finishes.
        away = np.linalg.norm(self.reference.points[others] - self.z, axis=1)
        lower, upper, witness = np.inf, float(away.min()), self.reference.points[others[away.argmin()]]
        for other, least in zip(others, screen, strict=True):
            if least >= upper:
                break
            projection = self._to_cell_of(other, upper)
            lower = min(lower, projection.distance)
            if projection.solved and float(np.linalg.norm(projection.move)) < upper:
                target = self.reference.points[other]
                flipped = self._inside(model, self.z + projection.move, target)
                distance = float(np.linalg.norm(flipped - self.z))
                if distance < upper:
                    upper, witness = distance, flipped
        return Flip(min(lower, upper), upper, witness)

    def _to_cell_of(self, other: np.int64, enough: float) -> Projection:
        """The way to the inputs that are as near to `other` as to all own points."""
        reference = self.reference
        slopes = 2 * (reference.pulled[self.own] - reference.pulled[other])
        room = self.distances[self.own] - self.distances[other]
        return smallest_move(slopes, room, self.slack, reference.pulled_error, enough)

    def _inside(self, model: MahalanobisKnn, boundary: Array, target: Array) -> Array:
        """The first input on the way from the boundary to the other point itself that has another answer.

        None has if the other point coincides under the metric with one of the own class that wins ties.
        """
        candidates = boundary + _STEPS_INSIDE[:, None] * (target - boundary)
        changed = (model(torch.from_numpy(candidates)).argmax(1) != self.label).tolist()
        return np.asarray(candidates[changed.index(True) if True in changed else 0])


def _queries(model: MahalanobisKnn, x: Tensor) -> Iterator[Query]:
    reference = Reference.of(model)
    for rows in x.flatten(1).split(_QUERIES):
        distances = model.squared_distances(rows)
        labels = model.votes(distances).argmax(1).tolist()
        for z, away, label in zip(_numpy(rows), _numpy(distances), labels, strict=True):
            yield Query.of(model, reference, z, away, label)


def _conditions(model: MahalanobisKnn) -> tuple[str, ...]:
    return (
        f"about {model.k} nearest neighbours among these {len(model.points)} reference points, none added, removed or "
        "relabelled, with this factor, distances in float64",
        "in the units of the inputs the model was given: scaling or extracting features anew voids it, and for "
        "features of a network it says nothing about the network's inputs",
        "proved, rounding included: errors of both the certificate and the model's distances are subtracted",
    )


def _largest(values: Array, rank: int) -> Array:
    """The rank-th largest of each row, 0 where there are fewer."""
    if values.shape[1] < rank:
        return np.zeros(len(values))
    place = values.shape[1] - rank
    return np.asarray(np.partition(values, place, axis=1)[:, place])


def _longest(rows: Array) -> float:
    return float(np.linalg.norm(rows, axis=1).max())


def _blocks(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _numpy(values: Tensor) -> Any:
    return values.detach().cpu().double().numpy()
