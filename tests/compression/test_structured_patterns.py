"""Patterns with structure, against brute force over everything they allow."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from trivet.compression.n_m import NM
from trivet.compression.structured import Structured
from trivet.errors import BadValue

GRANULARITIES: tuple[Literal["filter", "channel", "kernel", "row"], ...] = ("filter", "channel", "kernel", "row")


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (3, 2), (2, 2)])
@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 1, 1), (3, 2, 3, 2)])
def test_each_group_keeps_its_best_weights(m: int, n: int, shape: tuple[int, ...]) -> None:
    """Every choice in every group is tried; groups run over the channels first."""
    given_scores = scores(*shape)
    mask = NM(m).keep(given_scores, n / m)
    assert mask.shape == given_scores.shape
    for output in range(shape[0]):
        order = [
            (output, channel, *place)
            for place in itertools.product(*(range(size) for size in shape[2:]))
            for channel in range(shape[1])
        ]
        for start in range(0, len(order), m):
            group = order[start : start + m]
            best = max(itertools.combinations(group, n), key=lambda chosen: sum(float(given_scores[i]) for i in chosen))
            assert {i for i in group if bool(mask[i])} == set(best)


def test_a_group_that_is_not_full_keeps_as_many_as_it_can() -> None:
    mask = NM(4).keep(torch.tensor([[1.0, 4, 3, 2, 9], [0, 0, 0, 0, 0]]), 0.5)
    assert mask.tolist() == [[False, True, True, False, True], [False, False, True, True, True]]


def test_a_density_that_no_group_can_have_is_refused() -> None:
    for density in (0.1, 0.3, 0.6):
        with pytest.raises(BadValue, match=r"must keep a whole number of each 4 weights"):
            NM(4).keep(scores(2, 8), density)
    with pytest.raises(BadValue, match="m=1 must be at least 2"):
        NM(1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 4, 2), (5, 4)])
def test_the_units_kept_have_the_largest_sum_there_is(granularity: Any, shape: tuple[int, ...]) -> None:
    """Brute force over all choices of as many units, where they are few."""
    given_scores, pattern = scores(*shape), Structured(granularity)
    units = members(granularity, shape)
    for density in (0.34, 0.5):
        keep = len(units) - int((1 - density) * len(units) + 1e-9)
        mask = pattern.keep(given_scores, density)
        kept = [unit for unit in units if all(bool(mask[i]) for i in unit)]
        assert len(kept) == keep
        assert int(mask.sum()) == sum(len(unit) for unit in kept)
        totals = sorted((sum(float(given_scores[i]) for i in unit) for unit in units), reverse=True)
        assert float(given_scores[mask].sum()) == pytest.approx(sum(totals[:keep]), abs=1e-5)


def members(granularity: str, shape: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """The weights of each unit, by the words of the documentation."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in itertools.product(*(range(size) for size in shape)):
        name = {"filter": index[:1], "channel": index[1:2], "kernel": index[:2]}.get(granularity)
        if name is None:  # a row: everything but the last axis of a kernel
            name = index[:-1] if len(shape) > 2 else index
        found.setdefault(name, []).append(index)
    return list(found.values())


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(GRANULARITIES), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_spreading_the_units_covers_every_weight_once(granularity: Any, outputs: int, inputs: int, side: int) -> None:
    pattern, shape = Structured(granularity), torch.Size([outputs, inputs, side, side])
    count = len(pattern.units(torch.ones(shape)))
    covered = sum(pattern.spread(torch.arange(count) == unit, shape).long() for unit in range(count))
    assert torch.equal(torch.as_tensor(covered), torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("pattern", [NM(2), *map(Structured, GRANULARITIES)], ids=str)
def test_they_work_on_a_batch_of_layers_at_once(pattern: Any) -> None:
    many = scores(3, 4, 4, 2, 2)
    together = vmap(lambda each: pattern.keep(each, 0.5))(many)
    assert torch.equal(together, torch.stack([pattern.keep(each, 0.5) for each in many]))
