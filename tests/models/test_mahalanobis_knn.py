"""Nearest neighbours under a metric against scikit-learn's, and the ties that scikit-learn leaves open."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from trivet.errors import BadValue
from trivet.models.fingerprint import fingerprint
from trivet.models.mahalanobis_knn import MahalanobisKnn


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("rank", [3, 6])
def test_predictions_are_those_of_scikit_learn_under_the_same_metric(k: int, rank: int) -> None:
    points, x = torch.rand(200, 6, dtype=torch.float64), torch.rand(100, 6, dtype=torch.float64)
    labels, factor = torch.randint(4, (200,)), torch.randn(rank, 6, dtype=torch.float64)
    model = MahalanobisKnn(points, labels, k, factor)
    peer = KNeighborsClassifier(
        k, metric="mahalanobis", metric_params={"VI": (factor.T @ factor).numpy()}, algorithm="brute"
    )
    peer.fit(points.numpy(), labels.numpy())
    assert model(x).argmax(1).tolist() == peer.predict(x.numpy()).tolist()
    torch.testing.assert_close(model(x) / k, torch.from_numpy(peer.predict_proba(x.numpy())))


def test_the_distance_is_the_quadratic_form_of_a_semi_definite_matrix() -> None:
    model = MahalanobisKnn(torch.rand(9, 4), torch.arange(9) % 2, factor=torch.randn(2, 4))
    x = torch.rand(5, 4, dtype=torch.float64)
    M, difference = model.factor.T @ model.factor, x[:, None] - model.points
    assert torch.linalg.eigvalsh(M).min() >= -1e-12
    expected = torch.einsum("bni,ij,bnj->bn", difference, M, difference)
    torch.testing.assert_close(model.squared_distances(x), expected)


def test_near_neighbours_far_from_the_origin_are_told_apart() -> None:
    """|| a ||^2 - 2 a.b + || b ||^2 would round both distances to 0."""
    points = 1e8 + torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    model = MahalanobisKnn(points, torch.tensor([0, 1]))
    assert model.squared_distances(points[:1] + 0.25).tolist() == [[0.0625, 0.5625]]


def test_ties_go_to_the_earlier_point_and_the_smaller_class() -> None:
    points = torch.tensor([[-1.0], [1.0], [3.0]])
    assert MahalanobisKnn(points, torch.tensor([1, 0, 2]))(torch.zeros(1, 1)).argmax(1).item() == 1
    assert MahalanobisKnn(points, torch.tensor([2, 1, 0]), k=3)(torch.zeros(1, 1)).argmax(1).item() == 0


def test_the_fingerprint_covers_all_that_decides_an_answer() -> None:
    points, labels = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 1])
    models = [
        MahalanobisKnn(points, labels),
        MahalanobisKnn(points, labels, k=3),
        MahalanobisKnn(points, 1 - labels),
        MahalanobisKnn(points + 0.1, labels),
        MahalanobisKnn(points, labels, factor=2 * torch.eye(2)),
    ]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MahalanobisKnn(torch.rand(30, 4), torch.arange(30) % 3), torch.rand(20, 4)
    whole = model.squared_distances(x)
    monkeypatch.setattr("trivet.models.mahalanobis_knn._BLOCK", 1)
    assert model.squared_distances(x).equal(whole)


def test_bad_reference_sets_are_refused() -> None:
    points, labels = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(BadValue, match="k=2 must be odd"):
        MahalanobisKnn(points, labels, k=2)
    with pytest.raises(BadValue, match="k=5 must be odd, and at most the number of points, 4"):
        MahalanobisKnn(points, labels, k=5)
    with pytest.raises(BadValue, match=r"labels must be \[4\]"):
        MahalanobisKnn(points, labels[:3])
    with pytest.raises(BadValue, match="labels must be at least 0"):
        MahalanobisKnn(points, labels - 1)
    with pytest.raises(BadValue, match=r"factor must be \[R, 2\]"):
        MahalanobisKnn(points, labels, factor=torch.eye(3))
    with pytest.raises(BadValue, match="must be finite"):
        MahalanobisKnn(points / 0, labels)
    with pytest.raises(BadValue, match="inputs have 3 features, the reference points 2"):
        MahalanobisKnn(points, labels)(torch.rand(1, 3))
