"""Patch data taken apart again: every patch is its feature at the promised strength, plus the promised noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivet.data.dataset import Dataset
from trivet.data.patches import UNIT, features, patches
from trivet.errors import BadValue


def coordinates(data: Dataset) -> Tensor:
    """X [N, P, d] float64, in the paper's coordinates."""
    return ((data.images.double() - 0.5) / UNIT).squeeze(1)


def test_all_features_are_orthonormal() -> None:
    u, v = features(3, 40, draw=5)
    gram = torch.cat([u, v]) @ torch.cat([u, v]).T
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64))


def test_every_patch_is_the_feature_of_its_class_at_a_strength_in_its_range() -> None:
    data = patches(classes=4, dimension=10, count=7, robust=2, strong=1.5, weak=0.5, noise=0.0, train=50).train
    u, v = features(4, 10)
    x = coordinates(data)
    alpha, beta = (torch.einsum("npd,nd->np", x, each[data.labels]) for each in (u, v))
    chosen = alpha > 0.1
    assert (chosen.sum(1) == 2).all()
    assert ((alpha[chosen] >= 1.2 - 1e-5) & (alpha[chosen] <= 1.8 + 1e-5)).all()
    assert ((beta[~chosen] >= 0.4 - 1e-5) & (beta[~chosen] <= 0.6 + 1e-5)).all()
    rest = x - alpha[..., None] * u[data.labels][:, None] - beta[..., None] * v[data.labels][:, None]
    assert rest.abs().max() < 1e-5
    assert len(torch.unique(chosen.float(), dim=0)) > 10  # the places are drawn for each record


def test_noise_has_the_promised_deviation() -> None:
    """The variance of 216,000 draws is off by more than 2 % with odds below 1e-9 (its deviation is 0.3 %)."""
    data = patches(noise=0.3, train=500).train
    basis = torch.cat(features(3, 40))
    x = coordinates(data)
    rest = x - x @ basis.T @ basis  # 34 of 40 dimensions hold nothing but noise
    assert float(rest.square().sum()) / (500 * 12 * 34) == pytest.approx(0.09, rel=0.02)


def test_the_draw_decides_features_and_records_and_the_parts_differ() -> None:
    first, again, other = patches(draw=1), patches(draw=1), patches(draw=2)
    assert first.train.digest() == again.train.digest() != other.train.digest()
    assert not torch.equal(first.train.images, first.test.images[:120])
    assert first.train.labels.bincount(minlength=3).min() > 15
    assert first.train.input_shape == (1, 12, 40)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"classes": 1}, "classes=1"),
        ({"dimension": 5}, "dimension=5 must be at least 6"),
        ({"robust": 12}, "robust=12"),
        ({"robust": 0}, "robust=0"),
        ({"weak": 0.0}, "weak=0.0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"train": 0}, "train=0"),
        ({"strong": 20.0}, "strong=20.0.*beyond the 4"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, float], complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        patches(**setting)
