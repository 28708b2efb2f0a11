"""The estimator keeps scikit-learn's rules, agrees with its nearest neighbours, and its certificates hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from trivet.errors import BadValue
from trivet.estimators import ArmlClassifier

Table = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def iris() -> Table:
    """Two thirds to train, one to test, scaled to [0, 1]."""
    X, y = load_iris(return_X_y=True)
    test = np.arange(150) % 3 == 0
    scaler = MinMaxScaler().fit(X[~test])
    return scaler.transform(X[~test]), y[~test], scaler.transform(X[test]), y[test]


def fitted(iris: Table, n_neighbors: int = 1, **settings: Any) -> ArmlClassifier:
    return ArmlClassifier(n_neighbors, epochs=30, lr=0.01, **settings).fit(iris[0], iris[1])


@parametrize_with_checks([ArmlClassifier(epochs=3), ArmlClassifier(3, epochs=3)])
def test_it_keeps_the_rules_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("n_neighbors", [1, 5])
def test_it_answers_as_scikit_learn_does_under_the_learnt_metric(iris: Table, n_neighbors: int) -> None:
    classifier = fitted(iris, n_neighbors)
    M = classifier.get_mahalanobis_matrix()
    assert np.abs(M - np.eye(4)).max() > 0.05
    peer = KNeighborsClassifier(n_neighbors, algorithm="brute", metric="mahalanobis", metric_params={"VI": M})
    peer.fit(iris[0], iris[1])
    assert classifier.predict(iris[2]).tolist() == peer.predict(iris[2]).tolist()
    np.testing.assert_allclose(classifier.predict_proba(iris[2]), peer.predict_proba(iris[2]))


def test_nearest_neighbours_are_euclidean_after_the_transformation(iris: Table) -> None:
    classifier = fitted(iris)
    peer = KNeighborsClassifier(1, algorithm="brute").fit(classifier.transform(iris[0]), iris[1])
    assert classifier.predict(iris[2]).tolist() == peer.predict(classifier.transform(iris[2])).tolist()


@pytest.mark.parametrize(("n_neighbors", "exact"), [(1, None), (1, False), (5, None)])
def test_no_random_change_inside_the_radius_changes_the_prediction(
    iris: Table, n_neighbors: int, exact: bool | None
) -> None:
    classifier = fitted(iris, n_neighbors)
    found = classifier.certify(iris[2], exact=exact)
    assert classifier.classes_[found.labels.numpy()].tolist() == classifier.predict(iris[2]).tolist()
    assert (found.radii > 0).float().mean() > 0.8
    assert bool(found.evidence) == (n_neighbors == 1 and exact is None)
    directions = np.random.default_rng(0).normal(size=(200, 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for z, radius, label in zip(iris[2], found.radii.tolist(), classifier.predict(iris[2]), strict=True):
        assert (classifier.predict(z + 0.999999 * radius * directions) == label).all()


def test_the_nearest_flips_lie_at_the_exact_radius_and_are_predicted_otherwise(iris: Table) -> None:
    classifier = fitted(iris)
    flips = classifier.nearest_flips(iris[2])
    assert (classifier.predict(flips) != classifier.predict(iris[2])).all()
    away = np.linalg.norm(flips - iris[2], axis=1)
    np.testing.assert_allclose(away, classifier.certify(iris[2]).radii.numpy(), atol=1e-8)
    assert (classifier.certify(iris[2], exact=False).radii.numpy() <= away).all()


def test_labels_may_be_names_and_certificates_count_them(iris: Table) -> None:
    names = np.array(["setosa", "versicolor", "virginica"])
    classifier = ArmlClassifier(epochs=30, lr=0.01).fit(iris[0], names[iris[1]])
    assert classifier.classes_.tolist() == names.tolist()
    assert classifier.predict(iris[2]).tolist() == names[fitted(iris).predict(iris[2])].tolist()
    assert classifier.certify(iris[2][:1]).labels.tolist() == [0]


def test_it_stands_in_pipelines_and_searches() -> None:
    X, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(MinMaxScaler(), ArmlClassifier(3, epochs=10, lr=0.01))
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.9


def test_the_same_random_state_learns_the_same_metric_and_none_another_each_time(iris: Table) -> None:
    first, again, other = (fitted(iris, random_state=state).components_ for state in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    unseeded = [clone(fitted(iris, random_state=None)).fit(iris[0], iris[1]).components_ for _ in range(2)]
    assert not np.array_equal(*unseeded)


def test_without_epochs_the_distance_is_euclidean(iris: Table) -> None:
    classifier = ArmlClassifier(epochs=0).fit(iris[0], iris[1])
    np.testing.assert_array_equal(classifier.get_mahalanobis_matrix(), np.eye(4))
    assert classifier.loss_curve_.shape == (0,)


def test_what_cannot_be_done_is_refused_in_one_sentence(iris: Table) -> None:
    with pytest.raises(BadValue, match="n_neighbors=2 must be odd, and at most the number of records, n_samples=100"):
        ArmlClassifier(2).fit(iris[0], iris[1])
    with pytest.raises(BadValue, match="1 class teach no metric"):
        ArmlClassifier().fit(iris[0], np.zeros(100))
    with pytest.raises(BadValue, match="exact=True needs k=1, the model has k=3"):
        fitted(iris, 3).certify(iris[2], exact=True)
    with pytest.raises(BadValue, match="needs k=1"):
        fitted(iris, 3).nearest_flips(iris[2])
    with pytest.raises(NotFittedError):
        ArmlClassifier().certify(iris[2])
    with pytest.raises(NotFittedError):
        ArmlClassifier().get_mahalanobis_matrix()
