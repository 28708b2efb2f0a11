"""Crossbars: patterns against brute force, levels, the two-round mapping, and the mapping onto conductances."""

from __future__ import annotations

import copy
import itertools
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.compression.compression import Moment
from trivet.compression.crossbar import CrossbarBlocks, tiles_of
from trivet.compression.levels import Levels
from trivet.compression.masked_mapping import MaskedMapping
from trivet.compression.memristor import Constants, Device, conductances, crossbar_cost, under_variation
from trivet.compression.sparse_projection import Sparse
from trivet.errors import BadValue


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["block_column", "tile"]), st.sampled_from([0.25, 0.5, 0.75]))
def test_the_blocks_kept_are_the_best_of_all_choices(seed: int, granularity: Any, density: float) -> None:
    weight = normal(3, 2, 1, 2, seed=seed)
    pattern = CrossbarBlocks(granularity, rows=3, columns=2)
    found = Sparse(density, pattern).project(weight)
    matrix = weight.flatten(1)
    width = 1 if granularity == "block_column" else 3
    blocks = [(i, j) for i in range(0, 3, 2) for j in range(0, 4, width)]
    keep = len(blocks) - int((1 - density) * len(blocks) + 1e-9)
    best = max(
        sum(float(matrix[i : i + 2, j : j + width].square().sum()) for i, j in chosen)
        for chosen in itertools.combinations(blocks, keep)
    )
    assert float(found.square().sum()) == pytest.approx(best, rel=1e-5)
    torch.testing.assert_close(Sparse(density, pattern).project(found), found)


def test_a_block_goes_whole_and_edges_are_blocks_too() -> None:
    mask = CrossbarBlocks("tile", rows=4, columns=2).keep(normal(5, 10).abs(), 0.5)
    for i, j in itertools.product(range(0, 5, 2), range(0, 10, 4)):
        assert len(mask[i : i + 2, j : j + 4].unique()) == 1


VGG16 = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512), *[(512, 512)] * 5]
RESNET18 = [*[(64, 64)] * 4, (64, 128), *[(128, 128)] * 3, (128, 256), *[(256, 256)] * 3, (256, 512), *[(512, 512)] * 3]


@pytest.mark.parametrize(("convolutions", "tiles"), [(VGG16, 1798), (RESNET18, 1344)])
def test_dense_tiles_of_known_networks_are_those_counted_by_hand(convolutions: Any, tiles: int) -> None:
    assert sum(tiles_of(torch.ones(outs, ins, 3, 3)).dense for ins, outs in convolutions) == tiles


def test_tiles_left_are_those_of_the_inputs_each_tile_column_needs() -> None:
    assert tiles_of(torch.ones(65, 129)).dense == 4
    weight = torch.ones(5, 6)
    weight[2] = 0  # a filter goes: four are left, in two columns
    weight[:2, :3] = 0
    weight[3:, 1:] = 0
    assert tiles_of(weight, rows=2, columns=2).left == ceil(3 / 2) + 1
    assert tiles_of(torch.zeros(5, 6), 2, 2).left == 0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_every_weight_is_on_its_nearest_level_and_the_scale_is_the_best_for_them(seed: int, bits: int) -> None:
    levels, weight = Levels(bits), normal(40, seed=seed)
    weight[:10] = 0.0
    found = levels.project(weight)
    assert bool((found[:10] == 0).all())
    assert bool((found[10:] != 0).all())
    alpha, numbers = levels.assign(weight)
    grid = alpha * levels.level(torch.arange(levels.top + 1.0))
    nearest = (weight[10:, None].abs() - grid).abs().min(1).values
    torch.testing.assert_close((found - weight)[10:].abs(), nearest, atol=1e-5, rtol=1e-4)
    q = levels.level(numbers)[10:]
    torch.testing.assert_close(alpha, (weight[10:].abs() * q).sum() / q.square().sum())
    assert float(grid.max() / grid.min()) == pytest.approx(10.0)


@pytest.mark.parametrize(("bits", "cell_bits", "slices"), [(5, 4, 1), (9, 4, 2), (3, 2, 1), (7, 2, 3)])
def test_conductances_give_the_weights_back_in_the_window_of_the_device(bits: int, cell_bits: int, slices: int) -> None:
    levels, device = Levels(bits), Device(cell_bits=cell_bits)
    weight = levels.project(normal(6, 4, 3, 3).double())
    weight[0] = 0.0
    found = conductances(weight, levels, device)
    assert len(found.plus) == slices
    torch.testing.assert_close(found.weight, weight)
    cells = torch.stack([found.plus, found.minus])
    used = cells[cells > 0]
    assert float(used.min()) >= 1e-7 * (1 - 1e-9)
    assert float(used.max()) <= 1e-6 * (1 + 1e-9)
    assert bool((found.plus * found.minus == 0).all())
    assert len(used.round(decimals=12).unique()) <= 2**cell_bits


def test_products_through_tiles_and_slices_are_those_with_the_weight() -> None:
    levels, device = Levels(9), Device(rows=5, columns=3)
    weight = levels.project(normal(7, 12).double())
    on, x = conductances(weight, levels, device), normal(12, seed=1).double()
    out = torch.zeros(7, dtype=torch.float64)
    for s in range(2):
        for i, j in itertools.product(range(0, 7, 3), range(0, 12, 5)):
            tile = (on.plus - on.minus)[s, i : i + 3, j : j + 5]
            out[i : i + 3] += on.scale * 16**s * (tile @ x[j : j + 5])
    torch.testing.assert_close(out, weight @ x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(Levels(5).project(layer.weight))
    return model


def test_variation_of_nothing_is_the_network_itself_and_more_of_it_hurts_more() -> None:
    """Factors exp(sigma N): the mean distance grows with sigma; with 40 draws far beyond chance."""
    model, x = network(), normal(20, 12)

    def away(twin: nn.Module) -> float:
        return float((twin(x) - model(x)).detach().norm())

    means = [
        under_variation(model, Levels(5), Device(), sigma, away, torch.Generator().manual_seed(0), 40)[0]
        for sigma in (0.0, 0.1, 0.5)
    ]
    assert means[0] < 1e-4
    assert means[0] < means[1] < means[2]
    with pytest.raises(BadValue, match="draws=5 must be at least 20"):
        under_variation(model, Levels(5), Device(), 0.1, away, torch.Generator(), 5)


def test_the_cost_counts_pairs_and_slices_and_halves_with_the_bits() -> None:
    model = network()
    plain = crossbar_cost(model, Levels(5), Device(8, 4))
    assert plain.dense_crossbars == 2 * 2 * (2 * 2 + 1 * 1)
    assert plain.crossbars == plain.dense_crossbars / 2
    assert plain.area_ratio == 0.5
    assert plain.power_ratio is None
    made_up = Constants("made up for this test", 0.2, 1e-3, 1e-5)
    powered = crossbar_cost(model, Levels(5), Device(8, 4), made_up)
    assert powered.power_ratio is not None
    assert 0.4 < powered.power_ratio < 0.6  # converters dominate, and they are per crossbar
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[0].weight[:, :6] = 0.0
    devices = Constants("made up for this test", 1.0, 0.0, 0.0)  # nothing but devices draws power
    both = [crossbar_cost(pruned, Levels(5), Device(8, 4), devices, unpruned=first) for first in (None, model)]
    assert both[0].power_ratio is not None
    assert both[1].power_ratio is not None
    on = [conductances(Levels(9).project(layer.weight.double()), Levels(9), Device()) for layer in model[::2]]
    left = [conductances(layer.weight.double(), Levels(5), Device()) for layer in pruned[::2]]
    drawn = [sum(float((each.plus + each.minus).sum()) for each in layers) for layers in (left, on)]
    assert both[1].power_ratio == pytest.approx(drawn[0] / drawn[1])
    assert both[1].power_ratio < both[0].power_ratio
    with pytest.raises(BadValue, match="cell_bits=4 must divide the 5 bits"):
        crossbar_cost(model, Levels(6), Device())


def test_mapping_fixes_the_nearest_half_first_and_then_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:, ::3] = 0.0
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    method = MaskedMapping()
    method.attach(model)
    method.initialise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(10):
        method.before(model, Moment(step, 10, 10))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(normal(6, 12)), torch.arange(6) % 3).backward()
        optimizer.step()
        seen.append([layer.weight.detach().clone() for layer in (model[0], model[2])])
    still = (seen[0][0] == seen[4][0]) & (before[0] != 0)
    assert abs(float(still.sum()) / int((before[0] != 0).sum()) - 0.5) < 0.05
    assert all(torch.equal(a, b) for a, b in zip(seen[5], seen[9], strict=True))
    method.end(model)
    for layer, first in zip((model[0], model[2]), before, strict=True):
        assert torch.equal(layer.weight == 0, first == 0)
        assert len(layer.weight.abs().unique()) <= 17 + 16
