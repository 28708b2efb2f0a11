"""Curves and bounds over a dataset of certificates, and radii in print."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from trivet.certify.certifier import ABSTAIN, Certificates
from trivet.certify.curves import (
    average_certified_radius,
    certified_accuracy,
    format_radius,
    guaranteed_accuracy,
    share_histogram,
)
from trivet.errors import BadValue


def certificates(labels: list[int], radii: list[float], alpha: float = 0.001) -> Certificates:
    index = torch.arange(len(labels))
    return Certificates(
        index, torch.tensor(labels, dtype=torch.int64), torch.tensor(radii, dtype=torch.float64), "L2", alpha, ()
    )


FIVE = certificates([0, 1, 2, ABSTAIN, 1], [0.5, 0.25, 1.0, 0.0, 0.75])
TARGETS = torch.tensor([0, 1, 0, 3, 1])  # the third is certified with a wrong label


def test_certified_accuracy_counts_right_labels_with_enough_radius() -> None:
    rates = certified_accuracy(FIVE, TARGETS, [0.0, 0.25, 0.3, 0.75, 0.8])
    assert [rate.successes for rate in rates] == [3, 3, 2, 1, 0]
    assert {rate.trials for rate in rates} == {5}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(0, 2)), min_size=1, max_size=20))
def test_certified_accuracy_never_rises_with_the_radius_and_integrates_to_the_average_radius(
    points: list[tuple[int, int, float]],
) -> None:
    labels, targets, radii = (list(column) for column in zip(*points, strict=True))
    certified = certificates(labels, radii)
    grid = [k / 500 for k in range(1, 1001)]
    values = [rate.value for rate in certified_accuracy(certified, torch.tensor(targets), grid)]
    assert all(high >= low for high, low in itertools.pairwise(values))
    assert average_certified_radius(certified, torch.tensor(targets)) == pytest.approx(sum(values) / 500, abs=1 / 500)


def test_wrong_labels_and_abstentions_add_nothing_to_the_average_radius() -> None:
    assert average_certified_radius(FIVE, TARGETS) == pytest.approx((0.5 + 0.25 + 0.75) / 5)


@pytest.mark.parametrize(("trials", "alpha"), [(500, 0.001), (10_000, 0.001), (10_000, 0.1)])
def test_the_dataset_bound_holds_with_its_confidence_by_enumeration(trials: int, alpha: float) -> None:
    # The worst case: every input claimed right, each claim wrong with probability alpha.
    certified = certificates([0] * trials, [1.0] * trials, alpha)
    bound = guaranteed_accuracy(certified, torch.zeros(trials, dtype=torch.int64), 1.0, rho=0.001)
    failures_allowed = round((1 - bound) * trials)
    assert binom.sf(failures_allowed, trials, alpha) <= 0.001
    assert binom.sf(failures_allowed - 1, trials, alpha) > 0.001  # and with one failure less it would not hold


def test_the_published_expression_does_not_hold_for_many_inputs() -> None:
    trials, alpha, rho = 10_000, 0.001, 0.001
    log = math.log(1 / rho)
    published = alpha + math.sqrt(alpha * (1 - alpha) * log / trials) + log / (3 * trials)
    assert binom.sf(math.floor(published * trials), trials, alpha) > 1.5 * rho


def test_proofs_lose_nothing_to_the_dataset_bound() -> None:
    proofs = certificates([0, 1, 1], [0.1, 0.1, 0.0], alpha=0.0)
    assert guaranteed_accuracy(proofs, torch.tensor([0, 1, 1]), 0.1) == pytest.approx(2 / 3)


def test_the_dataset_bound_is_never_negative() -> None:
    assert guaranteed_accuracy(certificates([0], [0.1], alpha=0.5), torch.tensor([1]), 0.1) == 0.0


@settings(deadline=None, max_examples=200)
@given(st.floats(0, 1e4), st.integers(0, 6))
def test_a_printed_radius_never_exceeds_the_stored_one(radius: float, digits: int) -> None:
    printed = format_radius(radius, digits)
    assert Decimal(printed) <= Decimal(radius)
    assert float(printed) <= radius
    assert Decimal(radius) - Decimal(printed) < Decimal(1).scaleb(-digits)


def test_the_radii_that_published_logs_rounded_up_are_rounded_down() -> None:
    assert format_radius(0.95286) == "0.952"
    assert format_radius(1.90573, 2) == "1.90"
    assert format_radius(0.25) == "0.250"
    with pytest.raises(BadValue, match="finite"):
        format_radius(math.inf)


def test_targets_of_another_length_are_refused() -> None:
    with pytest.raises(BadValue, match="5 certificates but targets"):
        certified_accuracy(FIVE, torch.tensor([0, 1]), [0.0])


def test_shares_are_counted_in_equal_parts_with_both_ends() -> None:
    shares = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert share_histogram(shares) == np.histogram(shares.numpy(), 20, (0, 1))[0].tolist()
    assert share_histogram(torch.tensor([0.0, 0.49, 0.5, 1.0, 1.0]), 2) == [2, 3]
    assert share_histogram(torch.zeros(0), 3) == [0, 0, 0]
