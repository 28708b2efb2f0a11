"""Trivet's methods for arrays, with the interface of scikit-learn, which must be installed to import this module.

    from trivet.estimators import ArmlClassifier

    classifier = ArmlClassifier().fit(X, y)
    classifier.certify(X_test).radii

What they prove is in the units of the arrays they are given.
"""

# ruff: noqa: N803 - scikit-learn passes X by name

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from trivet.certify.certifier import Certificates
from trivet.certify.metric import MetricCertificate, nearest_flips
from trivet.data.extras import extra
from trivet.errors import require
from trivet.models.mahalanobis_knn import MahalanobisKnn
from trivet.training.arml import Arml

with extra("digits", "the estimators need scikit-learn"):
    from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data

Array = NDArray[np.float64]


class ArmlClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """K nearest neighbours under a metric that is learnt to be robust (ARML, Wang et al., NeurIPS 2020), certified.

    `fit` learns M = G^T G (`trivet.training.arml`) and keeps all records as the reference; `predict` takes the majority
    of the K nearest; `certify` proves for each input an l_2 radius within which the prediction cannot change
    (`trivet.certify.metric`): exact for one neighbour, a lower bound for more.

    Radii are in the units of the columns given. Scale them alike, e.g. with a MinMaxScaler fitted on the training
    records as in the paper; behind another transformation, a certificate is about its output, not about what went in.
    The fitted estimator contains its training records: it is not private.

    Args:
        n_neighbors: K, odd.
        epochs, lr, candidates: of `Arml`. `epochs=0` keeps the Euclidean distance.
        random_state: of the neighbours drawn in training; None draws another at every fit.

    Attributes:
        components_: [D, D], G; `transform` is X G^T, where the metric is Euclidean.
        classes_: the labels, sorted.
        knn_: the fitted `MahalanobisKnn`; its classes are positions in `classes_`.
        loss_curve_: [epochs], minus the mean margin in the units of X.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_neighbors: int = 1,
        *,
        epochs: int = 1000,
        lr: float = 1e-3,
        candidates: int = 10,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.epochs = epochs
        self.lr = lr
        self.candidates = candidates
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn the metric from `X` [N, D] and its labels `y` [N], of any type that scikit-learn classifies.

        Raises:
            BadValue: settings out of range, one class only, or no class with two records.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        points, labels = torch.from_numpy(np.array(X)), torch.from_numpy(codes.astype(np.int64))
        number = len(points)
        require(
            self.n_neighbors % 2 == 1 and 1 <= self.n_neighbors <= number,
            f"n_neighbors={self.n_neighbors} must be odd, and at most the number of records, n_samples={number}.",
        )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        arml = Arml(self.epochs, self.lr, self.candidates)
        factor, losses = arml.learn(points.float(), labels, seed=seed)
        self.classes_ = classes
        self.knn_ = MahalanobisKnn(points, labels, self.n_neighbors, factor)
        self.components_ = self.knn_.factor.numpy()
        self.loss_curve_ = losses.double().numpy()
        self.n_iter_ = self.epochs
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The labels [N] of `X` [N, D]."""
        votes = self._votes(X)
        return np.asarray(self.classes_[votes.argmax(1)])

    def predict_proba(self, X: ArrayLike) -> Array:
        """The share of the K votes for each class [N, C]: not calibrated, 0 or 1 for one neighbour."""
        votes = self._votes(X)
        return votes / self.knn_.k

    def transform(self, X: ArrayLike) -> Array:
        """X G^T [N, D]: nearest neighbours under the metric are Euclidean ones here."""
        checked = self._checked(X)
        return np.asarray(self.knn_.embed(checked).numpy())

    def certify(self, X: ArrayLike, *, exact: bool | None = None) -> Certificates:
        """For each of `X` [N, D] the predicted class, as a position in `classes_`, and the radius it is constant in.

        Args:
            exact: the smallest change itself, found and proved by quadratic programming, one neighbour only;
                False: the lower bound in closed form; None: exact for one neighbour.
        """
        checked = self._checked(X)
        return MetricCertificate(self.knn_.k == 1 if exact is None else exact).certify(self.knn_, checked)

    def nearest_flips(self, X: ArrayLike) -> Array:
        """For each of `X` [N, D] the nearest point that is predicted otherwise, in l_2; for one neighbour only."""
        checked = self._checked(X)
        return np.asarray(nearest_flips(self.knn_, checked).numpy())

    def get_mahalanobis_matrix(self) -> Array:
        """M = G^T G [D, D], positive semi-definite."""
        check_is_fitted(self)
        return self.components_.T @ self.components_

    def _votes(self, X: ArrayLike) -> Array:
        checked = self._checked(X)
        return np.asarray(self.knn_(checked).numpy())

    def _checked(self, X: ArrayLike) -> torch.Tensor:
        check_is_fitted(self)
        return torch.from_numpy(np.array(validate_data(self, X, dtype=np.float64, reset=False)))
