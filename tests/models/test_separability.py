"""Separability against loops over all pairs and the scatter matrices of NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trivet.models.separability import cross_similarity, separability


def drawn(seed: int, records: int = 30, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(records, 6, generator=generator) + 0.5
    return features, torch.arange(records) % classes * 3  # labels need not be 0, 1, 2


def pair_means(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Pair by pair."""
    cosines = torch.nn.functional.cosine_similarity(features.double()[:, None], features.double()[None], dim=2)
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j]
    alike = [float(cosines[i, j]) for i, j in pairs if labels[i] == labels[j]]
    apart = [float(cosines[i, j]) for i, j in pairs if labels[i] != labels[j]]
    return float(np.mean(alike)), float(np.mean(apart))


def test_cosines_are_the_means_over_all_pairs() -> None:
    features, labels = drawn(0)
    found = separability(features, labels)
    assert (found.intra, found.inter) == pytest.approx(pair_means(features, labels), abs=1e-12)


def test_a_zero_vector_is_orthogonal_to_everything() -> None:
    features, labels = drawn(0)
    features[3] = 0
    found = separability(features, labels)
    assert (found.intra, found.inter) == pytest.approx(pair_means(features, labels), abs=1e-12)


def test_fishers_ratio_is_that_of_the_scatter_matrices() -> None:
    features, labels = drawn(1)
    groups = [features[labels == label].double().numpy() for label in labels.unique()]
    means = np.stack([group.mean(0) for group in groups])
    between = np.trace(np.cov(means.T, bias=True))
    within = np.mean([np.trace(np.cov(group.T, bias=True)) for group in groups])
    assert separability(features, labels).fisher == pytest.approx(between / within, rel=1e-10)


def test_cross_similarity_counts_every_pair_of_a_class_once() -> None:
    (features, labels), (others, _) = drawn(2), drawn(3)
    cosines = torch.nn.functional.cosine_similarity(features.double()[:, None], others.double()[None], dim=2)
    pairs = [float(cosines[i, j]) for i in range(30) for j in range(30) if labels[i] == labels[j]]
    assert cross_similarity(features, others, labels) == pytest.approx(float(np.mean(pairs)), abs=1e-12)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_neither_scale_nor_rotation_nor_order_matters(seed: int, scale: float) -> None:
    features, labels = drawn(seed)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    order = torch.randperm(30, generator=generator)
    moved = scale * features.double()[order] @ rotation
    assert tuple(separability(moved, labels[order])) == pytest.approx(tuple(separability(features, labels)), rel=1e-6)


def test_what_has_no_pair_is_no_number() -> None:
    lonely = separability(torch.rand(3, 2), torch.arange(3))
    assert math.isnan(lonely.intra)
    assert not math.isnan(lonely.inter)
    single = separability(torch.rand(3, 2), torch.zeros(3, dtype=torch.long))
    assert math.isnan(single.inter)
    assert single.fisher == 0
