"""Certificates of nearest neighbours against rational arithmetic, a general solver, brute force and attacks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from trivet.certify.certificate_file import CertificateFile
from trivet.certify.metric import MetricCertificate, nearest_flips
from trivet.errors import BadValue
from trivet.models.fingerprint import fingerprint
from trivet.models.mahalanobis_knn import MahalanobisKnn

BOUND, EXACT = MetricCertificate(), MetricCertificate(exact=True)


def knn(
    seed: int, points: int = 14, size: int = 2, classes: int = 3, k: int = 1, rank: int | None = None
) -> MahalanobisKnn:
    draw = torch.Generator().manual_seed(seed)
    records = torch.rand(points, size, generator=draw, dtype=torch.float64)
    factor = torch.randn(rank or size, size, generator=draw, dtype=torch.float64)
    labels = (torch.arange(points) % classes)[torch.randperm(points, generator=draw)]
    return MahalanobisKnn(records, labels, k, factor)


def queries(seed: int, number: int, size: int = 2) -> Tensor:
    return torch.rand(number, size, generator=torch.Generator().manual_seed(seed + 10**6), dtype=torch.float64)


def answers(model: MahalanobisKnn, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def rational(values: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in values.tolist()]


def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((p * q for p, q in zip(a, b, strict=True)), Fraction(0))


def squared_bound(model: MahalanobisKnn, z: Tensor, label: int) -> Fraction:
    """The square of the radius of K nearest neighbours in exact rational arithmetic, straight from the theorem."""
    points, factor, (at,) = rational(model.points), rational(model.factor), rational(z[None])

    def image(v: list[Fraction]) -> list[Fraction]:
        return [dot(row, v) for row in factor]

    def minus(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
        return [p - q for p, q in zip(a, b, strict=True)]

    def distance(x: list[Fraction]) -> Fraction:
        moved = image(minus(at, x))
        return dot(moved, moved)

    columns = [list(column) for column in zip(*factor, strict=True)]

    def squared_move(own: list[Fraction], other: list[Fraction]) -> Fraction:
        ahead = distance(other) - distance(own)
        if ahead <= 0:
            return Fraction(0)
        pulled = [dot(column, image(minus(own, other))) for column in columns]
        return ahead**2 / (4 * dot(pulled, pulled))

    own = [p for p, each in zip(points, model.labels.tolist(), strict=True) if each == label]
    others = [p for p, each in zip(points, model.labels.tolist(), strict=True) if each != label]
    majority = (model.k + 1) // 2
    if len(own) < majority:
        return Fraction(0)
    needed = [sorted((squared_move(x, other) for x in own), reverse=True)[majority - 1] for other in others]
    return sorted(needed)[majority - 1]


def smallest_change(model: MahalanobisKnn, z: Tensor) -> float:
    """The smallest change of 1-NN by a general solver, over every point of another class."""
    points, M = model.points.numpy(), (model.factor.T @ model.factor).numpy()
    labels, at = model.labels.numpy(), z.numpy()
    label = int(answers(model, z[None]))
    best = np.inf
    for other in points[labels != label]:
        A = 2 * (points[labels == label] - other) @ M
        b = np.array([(at - p) @ M @ (at - p) for p in points[labels == label]]) - (at - other) @ M @ (at - other)
        found = minimize(
            lambda v: v @ v,
            other - at,
            jac=lambda v: 2 * v,
            constraints={"type": "ineq", "fun": lambda v, A=A, b=b: b - A @ v, "jac": lambda _, A=A: -A},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        if found.success:
            best = min(best, float(np.linalg.norm(found.x)))
    return best


def test_between_two_points_it_is_the_distance_to_their_bisector() -> None:
    model = MahalanobisKnn(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    x = torch.tensor([[0.2, 5.0], [0.9, -3.0]], dtype=torch.float64)
    for certifier in (BOUND, EXACT):
        found = certifier.certify(model, x)
        assert found.labels.tolist() == [0, 1]
        torch.testing.assert_close(found.radii, torch.tensor([0.3, 0.4], dtype=torch.float64), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.sampled_from([0, 1e2, 1e6]),
)
def test_the_bound_is_the_theorem_in_rational_arithmetic_and_never_above_it(
    seed: int, k: int, classes: int, flat: bool, offset: float
) -> None:
    """`flat`: a factor of rank one. `offset`: the farther from the origin, the more is subtracted for rounding, without
    limit where two points all but coincide in the metric: how close the bound comes is asked at the origin alone."""
    model = knn(seed, size=3, classes=classes, k=k, rank=1 if flat else None)
    model.points += offset
    x = queries(seed, 3, size=3) + offset
    found = BOUND.certify(model, x)
    for z, label, radius in zip(x, found.labels.tolist(), found.radii.tolist(), strict=True):
        exact = squared_bound(model, z, label)
        assert Fraction(radius) ** 2 <= exact
        assert offset or radius >= float(exact) ** 0.5 - 1e-6


@pytest.mark.parametrize("rank", [3, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_exact_radius_is_the_smallest_change_of_a_general_solver(seed: int, rank: int) -> None:
    model, x = knn(seed, size=3, rank=rank), queries(seed, 3, size=3)
    found = EXACT.certify(model, x)
    for z, radius, flip in zip(x, found.radii.tolist(), found.evidence["flip"].tolist(), strict=True):
        peer = smallest_change(model, z)
        assert radius == pytest.approx(peer, abs=2e-6)
        assert radius <= flip == pytest.approx(radius, abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_bound_below_exact_below_the_nearest_other_point(seed: int, size: int) -> None:
    model, x = knn(seed, points=20, size=size), queries(seed, 5, size=size)
    bound, exact = BOUND.certify(model, x), EXACT.certify(model, x)
    away = torch.cdist(x, model.points).masked_fill(model.labels == exact.labels[:, None], torch.inf).amin(1)
    assert (bound.radii <= exact.radii + 1e-12).all()
    assert (exact.radii <= away).all()


def test_with_one_point_of_the_class_the_bound_is_exact() -> None:
    model = knn(5, points=30)
    model.labels[:] = 1
    model.labels[7] = 0
    x = model.points[7:8] + 0.001
    bound, exact = BOUND.certify(model, x), EXACT.certify(model, x)
    assert bound.labels.tolist() == [0]
    torch.testing.assert_close(bound.radii, exact.radii, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5, 11]), st.integers(2, 4))
def test_no_change_inside_the_radius_changes_the_answer(seed: int, k: int, classes: int) -> None:
    """2-D, all directions at several depths, and straight at every point of another class."""
    model, x = knn(seed, points=25, classes=classes, k=k), queries(seed, 4)
    found = (EXACT if k == 1 else BOUND).certify(model, x)
    angles = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)[:-1]
    for z, label, radius in zip(x, found.labels, found.radii, strict=True):
        directions = torch.cat(
            [torch.stack([angles.cos(), angles.sin()], 1), nn.functional.normalize(model.points - z)]
        )
        for depth in (0.3, 0.9, 1 - 1e-9):
            assert (answers(model, z + depth * radius * directions) == label).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e4]))
def test_the_radius_of_one_neighbour_withstands_a_search_among_neighbouring_floats(seed: int, offset: float) -> None:
    """Just inside the exactly measured sphere, toward the nearest flip, the answer stays; at the flip it is another."""
    model = knn(seed, points=25)
    model.points += offset
    x = queries(seed, 4) + offset
    found, flips = EXACT.certify(model, x), nearest_flips(model, x)
    assert (answers(model, flips) != found.labels).all()
    tried = 0
    for z, flip, label, radius in zip(x, flips, found.labels, found.radii.tolist(), strict=True):
        steps = 1 - torch.tensor([0, 1e-16, 1e-15, 1e-14, 1e-12, 1e-9, 1e-7, 1e-5], dtype=torch.float64)
        near = z + steps[:, None] * (flip - z) * (radius / float((flip - z).norm()))
        (at,) = rational(z[None])
        for candidate, exactly in zip(near, rational(near), strict=True):
            moved = [p - q for p, q in zip(exactly, at, strict=True)]
            if dot(moved, moved) < Fraction(radius) ** 2:
                tried += 1
                assert answers(model, candidate[None]) == label
    assert tried >= 4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]))
def test_leaving_out_points_of_the_class_loosens_the_bound_and_leaving_out_others_breaks_it(seed: int, k: int) -> None:
    model, x = knn(seed, points=24, classes=2, k=k), queries(seed, 1)
    found = BOUND.certify(model, x)
    own = model.labels == found.labels
    nearest = model.squared_distances(x)[0].argsort()

    def without(point: int) -> float:
        keep = torch.arange(len(own)) != point
        fewer = MahalanobisKnn(model.points[keep], model.labels[keep], k, model.factor)
        found_again = BOUND.certify(fewer, x)
        return float(found_again.radii) if found_again.labels == found.labels else 0.0

    last_own, first_other = nearest[own[nearest]][-1], nearest[~own[nearest]][0]
    assert without(int(last_own)) <= float(found.radii) + 1e-9
    assert without(int(first_other)) >= float(found.radii) - 1e-9


@pytest.mark.parametrize("certifier", [BOUND, EXACT])
def test_the_length_of_the_factor_does_not_matter_its_shape_does(certifier: MetricCertificate) -> None:
    model, x = knn(3, points=40, size=4), queries(3, 10, size=4)
    scaled = MahalanobisKnn(model.points, model.labels, 1, 1000 * model.factor)
    euclidean = MahalanobisKnn(model.points, model.labels, 1)
    radii = certifier.certify(model, x).radii
    torch.testing.assert_close(certifier.certify(scaled, x).radii, radii, rtol=0, atol=1e-9)
    assert (certifier.certify(euclidean, x).radii - radii).abs().max() > 0.01


def test_points_that_coincide_with_those_of_another_class_certify_nothing() -> None:
    points = torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.9, 0.9]])
    model = MahalanobisKnn(points, torch.tensor([0, 1, 1]))
    x = torch.tensor([[0.2, 0.3]], dtype=torch.float64)
    for certifier in (BOUND, EXACT):
        found = certifier.certify(model, x)
        assert (found.labels.tolist(), found.radii.tolist()) == ([0], [0.0])


def test_an_answer_without_a_majority_has_radius_zero() -> None:
    """Three classes share five votes 2 : 2 : 1."""
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4], [9.0]])
    model = MahalanobisKnn(points, torch.tensor([0, 0, 1, 1, 2, 2]), k=5)
    found = BOUND.certify(model, torch.tensor([[0.2]]))
    assert (found.labels.tolist(), found.radii.tolist()) == ([0], [0.0])


def test_blocks_and_screens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = knn(9, points=300, size=5, k=5), queries(9, 20, size=5)
    whole = BOUND.certify(model, x).radii
    for name, value in (("_BLOCK", 3), ("_SCREEN", 1), ("_QUERIES", 7)):
        monkeypatch.setattr(f"trivet.certify.metric.{name}", value)
    torch.testing.assert_close(BOUND.certify(model, x).radii, whole, rtol=0, atol=1e-9)


def test_images_are_certified_as_rows_and_progress_is_told() -> None:
    images, told = torch.rand(12, 1, 3, 3), []
    model = MahalanobisKnn(images[:10], torch.arange(10) % 2)
    found = EXACT.certify(model, images[10:], index=torch.tensor([4, 2]), advance=told.append)
    assert (found.index.tolist(), told) == ([4, 2], [1, 1])
    assert nearest_flips(model, images[10:]).shape == (2, 1, 3, 3)


def test_certificates_are_saved_and_read_back_unless_they_claim_more_than_a_flip_allows(tmp_path: Path) -> None:
    model, x = knn(1), queries(1, 4)
    found = EXACT.certify(model, x)
    file = CertificateFile(found, found.labels, EXACT, 0, fingerprint(model))
    file.save(tmp_path / "c.json")
    assert CertificateFile.load(tmp_path / "c.json", fingerprint(model)).certificates.radii.equal(found.radii)
    found.radii.mul_(1.01)
    assert not EXACT.follows(found)
    assert not BOUND.follows(found)


def test_what_cannot_be_certified_is_refused() -> None:
    model, x = knn(0, k=3), queries(0, 2)
    with pytest.raises(BadValue, match="a Linear is no MahalanobisKnn"):
        BOUND.certify(nn.Linear(2, 2), x)
    with pytest.raises(BadValue, match="exact=True needs k=1, the model has k=3"):
        EXACT.certify(model, x)
    with pytest.raises(BadValue, match="needs k=1"):
        nearest_flips(model, x)
    with pytest.raises(BadValue, match="must be finite"):
        BOUND.certify(model, x * torch.nan)
    with pytest.raises(BadValue, match="index must be"):
        BOUND.certify(model, x, index=torch.arange(3))
    with pytest.raises(BadValue, match="0 points are not of class 0, fewer than 1"):
        BOUND.certify(MahalanobisKnn(x, torch.zeros(2, dtype=torch.int64)), x)
