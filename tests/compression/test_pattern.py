"""Patterns keep the largest scores, in exactly the number asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from trivet.compression.pattern import largest
from trivet.compression.unstructured import Unstructured
from trivet.errors import BadValue


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_what_is_dropped_is_the_head_of_a_stable_sort(values: list[int], density: float) -> None:
    """Small integers, so that most cases have ties."""
    scores = torch.tensor(values, dtype=torch.float32)
    drop = int((1 - density) * len(values) + 1e-9)
    expected = torch.ones(len(values), dtype=torch.bool)
    expected[scores.argsort(stable=True)[:drop]] = False
    assert torch.equal(largest(scores, density), expected)


@pytest.mark.parametrize(("count", "density", "kept"), [(10, 0.9, 9), (10, 0.1, 1), (1000, 0.99, 990), (7, 1.0, 7)])
def test_the_count_survives_floating_point(count: int, density: float, kept: int) -> None:
    assert int(largest(torch.rand(count), density).sum()) == kept


def test_it_works_on_a_batch_of_layers_at_once() -> None:
    scores = torch.rand(5, 3, 4)
    together = vmap(lambda each: Unstructured().keep(each, 0.3))(scores)
    assert torch.equal(together, torch.stack([Unstructured().keep(each, 0.3) for each in scores]))


def test_a_density_outside_its_range_is_refused() -> None:
    with pytest.raises(BadValue, match=r"density=0 must lie in \(0, 1\]"):
        largest(torch.rand(3), 0)
