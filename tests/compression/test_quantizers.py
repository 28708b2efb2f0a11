"""Projections onto grids: against brute force, and their invariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivet.compression.binary import Binary
from trivet.compression.m_bit import MBit
from trivet.compression.projection import Projection
from trivet.compression.ternary import Ternary
from trivet.errors import BadValue

EVERY = [Binary(), Ternary(), MBit(2), MBit(4), MBit(8), MBit(4, "author"), Ternary("author")]


def weights(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def distance(weight: Tensor, levels: Tensor) -> float:
    """From `weight` to the line s * levels, over all s >= 0."""
    scale = (weight @ levels / (levels @ levels).clamp_min(1e-30)).clamp_min(0)
    return float((weight - scale * levels).norm())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_binary_and_ternary_are_the_nearest_of_all_sign_patterns(seed: int) -> None:
    weight = weights(seed, 7)
    for projection, signs in ((Binary(), (-1.0, 1.0)), (Ternary(), (-1.0, 0.0, 1.0))):
        best = min(distance(weight, torch.tensor(each)) for each in itertools.product(signs, repeat=7))
        assert float((weight - projection.project(weight)).norm()) == pytest.approx(best, abs=1e-5)


def test_the_exact_ternary_is_nearer_than_the_authors_by_as_much_as_the_page_says() -> None:
    """1,000 Gaussian weights: 14.6 against 19.2, the difference being the scale."""
    weight = weights(0, 1000)
    exact, author = (float((weight - Ternary(rule).project(weight)).norm()) for rule in ("exact", "author"))
    assert 13 < exact < 16
    assert author > 1.2 * exact


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 5]))
def test_lloyd_ends_where_neither_scale_nor_levels_can_improve_and_not_behind_the_authors_round(
    seed: int, bits: int
) -> None:
    weight = weights(seed, 60)
    found = MBit(bits).project(weight)
    top = 2 ** (bits - 1) - 1
    scale = float(found.abs()[found != 0].min())
    levels = (found / scale).round()
    assert float(levels.abs().max()) <= top * 2
    assert distance(weight, levels) == pytest.approx(float((weight - found).norm()), abs=1e-4)
    assert float((weight - found).norm()) <= float((weight - MBit(bits, "author").project(weight)).norm()) + 1e-5


def test_the_authors_four_bits_are_their_thresholds() -> None:
    weight = weights(3, 200)
    d = weight.abs().max() / 15
    q = torch.zeros_like(weight)
    for j in range(1, 7):
        q[((2 * j - 1) * d < weight.abs()) & (weight.abs() <= (2 * j + 1) * d)] = j
    q[weight.abs() > 13 * d] = 7
    scale = (weight.abs() * q).sum() / q.square().sum()
    torch.testing.assert_close(MBit(4, "author").project(weight), scale * q * weight.sign())


@pytest.mark.parametrize("projection", EVERY)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.125, 3.0]))
def test_scale_and_sign_pass_through_and_zeros_stay(projection: Projection, seed: int, factor: float) -> None:
    weight = weights(seed, 30).reshape(5, 6)
    weight[1] = 0.0
    found = projection.project(weight)
    assert found.shape == weight.shape
    assert bool((found[1] == 0).all())
    torch.testing.assert_close(projection.project(-factor * weight), -factor * found)
    masked = weight[[0, 2, 3, 4]]
    if not isinstance(projection, Ternary) or projection.rule == "exact":
        torch.testing.assert_close(found[[0, 2, 3, 4]], projection.project(masked))


@pytest.mark.parametrize("projection", [Binary(), Ternary(), MBit(2), MBit(4)])
def test_what_is_on_the_grid_stays(projection: Projection) -> None:
    found = projection.project(weights(1, 50))
    torch.testing.assert_close(projection.project(found), found)
    assert torch.equal(projection.project(torch.zeros(4)), torch.zeros(4))


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(BadValue, match="bits=1 must lie between 2 and 8"):
        MBit(1)
