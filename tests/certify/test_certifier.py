"""Certificates as values: what they refuse to be, and how shards are put together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from trivet.certify.certifier import ABSTAIN, Certificates, join
from trivet.errors import BadValue


def certificates(index: list[int], labels: list[int], radii: list[float]) -> Certificates:
    return Certificates(
        torch.tensor(index),
        torch.tensor(labels),
        torch.tensor(radii, dtype=torch.float64),
        "L2",
        0.001,
        ("of the float32 evaluation",),
        {"count": torch.tensor(index) * 10},
    )


def test_abstentions_are_told_apart() -> None:
    assert certificates([0, 1], [3, ABSTAIN], [0.5, 0.0]).abstained.tolist() == [False, True]


@pytest.mark.parametrize("radius", [math.nan, math.inf, -0.1])
def test_a_radius_that_is_negative_or_not_finite_is_refused(radius: float) -> None:
    with pytest.raises(BadValue, match=r"input \[7\] has label \[2\] and radius"):
        certificates([5, 7], [1, 2], [0.3, radius])


def test_an_abstention_with_a_radius_is_refused() -> None:
    with pytest.raises(BadValue, match="0 for abstentions"):
        certificates([0], [ABSTAIN], [0.1])


def test_columns_of_other_lengths_or_types_are_refused() -> None:
    with pytest.raises(BadValue, match=r"radii must be \[2\]"):
        certificates([0, 1], [1, 1], [0.1])
    with pytest.raises(BadValue, match="radii must be float64"):
        replace(certificates([0], [1], [0.1]), radii=torch.tensor([0.1]))


def test_shards_join_in_order_of_index() -> None:
    whole = join([certificates([4, 2], [1, 2], [0.4, 0.2]), certificates([3], [ABSTAIN], [0.0])])
    assert whole.index.tolist() == [2, 3, 4]
    assert whole.labels.tolist() == [2, ABSTAIN, 1]
    assert whole.radii.tolist() == [0.2, 0.0, 0.4]
    assert whole.evidence["count"].tolist() == [20, 30, 40]


def test_shards_that_overlap_or_differ_in_conditions_do_not_join() -> None:
    one = certificates([0], [1], [0.1])
    with pytest.raises(BadValue, match="twice"):
        join([one, certificates([1, 0], [1, 1], [0.1, 0.1])])
    for other in (replace(one, alpha=0.01), replace(one, norm="L1"), replace(one, conditions=("of bfloat16",))):
        with pytest.raises(BadValue, match="cannot be joined"):
            join([one, replace(other, index=torch.tensor([1]))])
    with pytest.raises(BadValue, match="no certificates"):
        join([])
