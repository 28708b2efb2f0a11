"""ARML: margins against projections without the formula, triples against brute force, steps against a second Adam."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trivet.certify.metric import MetricCertificate
from trivet.errors import BadValue
from trivet.models.mahalanobis_knn import MahalanobisKnn
from trivet.randomness import generator
from trivet.training.arml import Arml, triples
from trivet.training.arml import margins as margins_of_images


def triple(size: int, rank: int, number: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor = torch.randn(rank, size, dtype=torch.float64)
    z, own, others = torch.rand(3, number, size, dtype=torch.float64)
    return factor, z, own, others


def margins(factor: Tensor, *points: Tensor) -> Tensor:
    return margins_of_images(factor, *(each @ factor.T for each in points))


def distance(factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    M = factor.T @ factor
    return torch.einsum("bi,ij,bj->b", a - b, M, a - b)


def records(seed: int = 0, number: int = 40, size: int = 3, classes: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(number, size, generator=draw, dtype=torch.float64)
    return x, torch.arange(number) % classes


@pytest.mark.parametrize(("size", "rank"), [(2, 2), (5, 5), (5, 2)])
def test_the_margin_is_the_distance_to_where_both_points_are_as_near(size: int, rank: int) -> None:
    """d_M(z + v, x-) - d_M(z + v, x+) is affine in v: its values at 0 and at the unit vectors tell all."""
    factor, z, own, others = triple(size, rank)

    def ahead(moved: Tensor) -> Tensor:
        return distance(factor, moved, others) - distance(factor, moved, own)

    offset = ahead(z)
    slope = torch.stack([ahead(z + unit) - offset for unit in torch.eye(size, dtype=torch.float64)], 1)
    found = margins(factor, z, own, others)
    torch.testing.assert_close(found.abs(), offset.abs() / slope.norm(dim=1))
    assert found.sign().equal(offset.sign())
    assert (offset < 0).any()
    nearest = z - offset[:, None] * slope / slope.square().sum(1, keepdim=True)
    torch.testing.assert_close(distance(factor, nearest, own), distance(factor, nearest, others))
    torch.testing.assert_close((nearest - z).norm(dim=1), found.abs())


def test_margins_do_not_change_with_the_length_of_the_factor() -> None:
    factor, z, own, others = triple(4, 4)
    torch.testing.assert_close(margins(1000 * factor, z, own, others), margins(factor, z, own, others))


def test_the_gradient_of_the_margin_is_its_slope() -> None:
    factor, z, own, others = triple(3, 3, 6)
    assert torch.autograd.gradcheck(lambda G: margins(G, z, own, others), factor.requires_grad_())


def test_points_that_coincide_under_the_metric_give_no_infinite_margin() -> None:
    z, own = torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    assert margins(torch.eye(2), z, own, own).tolist() == [0.0]
    assert margins(torch.eye(2)[:1], z, own, torch.tensor([[1.0, 9.0]])).tolist() == [0.0]


@pytest.mark.parametrize("candidates", [1, 4, 1000])
def test_triples_are_drawn_from_all_and_only_the_nearest(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brute force; 12 records of 3 classes, 400 draws: one of at most 8 candidates missed with chance below 1e-19."""
    monkeypatch.setattr("trivet.training.arml._BLOCK", 3)
    x, labels = records(number=12)
    allowed_own, allowed_others = [], []
    for row, each in enumerate(x):
        order = [i for i in (x - each).square().sum(1).argsort().tolist() if i != row]
        allowed_own.append(set([i for i in order if labels[i] == labels[row]][:candidates]))
        allowed_others.append(set([i for i in order if labels[i] != labels[row]][:candidates]))
    seen_own: list[set[int]] = [set() for _ in x]
    seen_others: list[set[int]] = [set() for _ in x]
    for epoch in range(400):
        anchors, own, others = triples(x, labels, candidates, generator(0, "test", epoch))
        assert anchors.tolist() == list(range(12))
        for row, (mine, other) in enumerate(zip(own.tolist(), others.tolist(), strict=True)):
            seen_own[row].add(mine)
            seen_others[row].add(other)
    assert (seen_own, seen_others) == (allowed_own, allowed_others)


def test_candidates_are_drawn_uniformly() -> None:
    """Three candidates of each kind, 600 epochs of 40 records: chi-square with 2 degrees of freedom, level 1e-7."""
    x, labels = records()
    counts = torch.zeros(2, 3)
    away = (x[:, None] - x).square().sum(2)
    same = (labels[:, None] == labels) & ~torch.eye(len(x), dtype=torch.bool)
    for epoch in range(600):
        anchors, own, others = triples(x, labels, 3, generator(1, "test", epoch))
        for kind, (drawn, allowed) in enumerate(((own, same), (others, labels[:, None] != labels))):
            ranks = (allowed & (away < away[anchors, drawn][:, None])).sum(1)
            counts[kind] += ranks.bincount(minlength=3)
    expected = 600 * 40 / 3
    assert ((counts - expected).square() / expected).sum(1).max() < -2 * math.log(1e-7)


def test_a_record_alone_in_its_class_is_no_anchor_but_may_be_the_other() -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [0.9]])
    anchors, own, others = triples(x, torch.tensor([0, 0, 2, 1]), 1, generator(0, "test"))
    assert (anchors.tolist(), own.tolist(), others.tolist()) == ([0, 1], [1, 0], [2, 2])


def test_the_steps_are_those_of_adam_on_the_mean_margin_by_differences() -> None:
    """Candidates of one leave no randomness; the gradient comes from central differences of an own margin in numpy."""
    x, labels = records(number=15, size=2)
    factor, losses = Arml(epochs=4, lr=0.05, candidates=1).learn(x, labels, seed=0)
    points, classes = x.numpy(), labels.numpy()

    def mean_margin(G: np.ndarray, chosen: list[tuple[int, int, int]]) -> float:
        M, total = G.T @ G, 0.0
        for z, own, other in chosen:
            ours, theirs, between = points[z] - points[own], points[z] - points[other], points[own] - points[other]
            total += (theirs @ M @ theirs - ours @ M @ ours) / (2 * np.linalg.norm(M @ between))
        return total / len(chosen)

    G, first, second = np.eye(2), np.zeros((2, 2)), np.zeros((2, 2))
    for step in range(1, 5):
        away = np.square((points[:, None] - points) @ G.T).sum(2)
        np.fill_diagonal(away, np.inf)
        same = classes[:, None] == classes
        nearest_own = np.where(same, away, np.inf).argmin(1)
        nearest_other = np.where(same, np.inf, away).argmin(1)
        chosen = list(zip(range(15), nearest_own, nearest_other, strict=True))
        assert float(losses[step - 1]) == pytest.approx(-mean_margin(G, chosen))
        gradient = np.zeros((2, 2))
        for i in range(2):
            for j in range(2):
                shift = np.zeros((2, 2))
                shift[i, j] = 1e-6
                gradient[i, j] = -(mean_margin(G + shift, chosen) - mean_margin(G - shift, chosen)) / 2e-6
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        G = G - 0.05 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(factor.numpy(), G, atol=1e-6)


def test_without_epochs_the_metric_is_euclidean() -> None:
    factor, losses = Arml(epochs=0).learn(*records(), seed=0)
    assert factor.equal(torch.eye(3, dtype=torch.float64))
    assert losses.shape == (0,)


def test_the_seed_names_the_run_and_progress_is_told() -> None:
    told: list[int] = []
    arml = Arml(epochs=5)
    first, losses = arml.learn(*records(), seed=1, advance=told.append)
    again, _ = arml.learn(*records(), seed=1)
    other, _ = arml.learn(*records(), seed=2)
    assert first.equal(again)
    assert not first.equal(other)
    assert (told, losses.shape) == ([1] * 5, (5,))


def test_which_whole_numbers_name_the_classes_does_not_matter() -> None:
    x, labels = records()
    names = torch.tensor([-5, 10**12, 3])
    arml = Arml(epochs=3, candidates=2)
    assert arml.learn(x, names[labels], seed=0)[0].equal(arml.learn(x, names.argsort().argsort()[labels], seed=0)[0])


def test_the_certified_radii_of_new_records_grow_where_one_column_is_noise() -> None:
    """The first column tells the classes, at 0.25 and 0.75; the other seven are noise. Radius at most about 0.25."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 2
    x = torch.rand(240, 8, generator=draw, dtype=torch.float64)
    x[:, 0] = 0.25 + 0.5 * labels + 0.05 * torch.randn(240, generator=draw, dtype=torch.float64)
    train, test = slice(0, 160), slice(160, 240)
    factor, losses = Arml(epochs=150, lr=0.01).learn(x[train].float(), labels[train], seed=0)

    def mean_radius(G: Tensor | None) -> float:
        found = MetricCertificate().certify(MahalanobisKnn(x[train], labels[train], 1, G), x[test])
        return float((found.radii * (found.labels == labels[test])).mean())

    assert losses[-1] < losses[0] - 0.02
    assert mean_radius(factor) > 1.3 * mean_radius(None)


def test_what_teaches_no_metric_is_refused() -> None:
    x, labels = records(number=6)
    with pytest.raises(BadValue, match="epochs=-1 must not be negative"):
        Arml(epochs=-1)
    with pytest.raises(BadValue, match="lr=0 must be positive"):
        Arml(lr=0)
    with pytest.raises(BadValue, match="candidates=0 must be at least 1"):
        Arml(candidates=0)
    with pytest.raises(BadValue, match=r"records must be \[N, D\] and labels \[N\], got \(6, 3\) and \(5,\)"):
        Arml(epochs=1).learn(x, labels[:5], seed=0)
    with pytest.raises(BadValue, match="records must be finite"):
        Arml(epochs=1).learn(x / 0, labels, seed=0)
    with pytest.raises(BadValue, match="records of 1 class teach no metric"):
        Arml(epochs=1).learn(x, labels * 0, seed=0)
    with pytest.raises(BadValue, match="no class has two records"):
        Arml(epochs=1).learn(x, torch.arange(6), seed=0)
