"""Transforms against scipy and array shifts, the search against the exhaustive grid, and the set's own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import Points
from scipy import ndimage
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.methods import build
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import (
    RotationTranslation,
    RotationTranslationSearch,
    bilinear,
    worst_transform,
)

SMALL = RotationTranslation(shift=2.0, angle=20.0, shifts=3, angles=5)


def images(side: int = 9, batch: int = 3, channels: int = 2, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, side, side + 2, generator=draw, dtype=torch.float64)


def by_scipy(image: np.ndarray, down: float, right: float, degrees: float) -> np.ndarray:
    """One channel turned about its centre, then shifted; nothing but zeros outside, at the edges too."""
    a, centre = math.radians(degrees), (np.array(image.shape) - 1) / 2
    matrix = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    settings = {"order": 1, "mode": "grid-constant", "cval": 0.0, "prefilter": False}
    turned = ndimage.affine_transform(image, matrix, centre - matrix @ centre, **settings)
    return ndimage.shift(turned, (down, right), **settings)


@pytest.mark.parametrize("move", [(0.0, 0.0, 17.0), (1.5, -0.25, 0.0), (-2.0, 3.0, -30.0), (0.7, 2.9, 90.0)])
def test_transforms_are_those_of_scipy(move: tuple[float, float, float]) -> None:
    x = images()
    moved = SMALL.moved(x, torch.tensor([move], dtype=torch.float64))
    expected = np.stack([[by_scipy(channel, *move) for channel in image] for image in x.numpy()])
    torch.testing.assert_close(moved, torch.from_numpy(expected).clamp(0, 1), atol=1e-12, rtol=0)


def test_padding_brings_back_what_a_rotation_turned_out_of_the_frame() -> None:
    x, move = images(), torch.tensor([[2.0, 1.0, 30.0]], dtype=torch.float64)
    padded = torch.nn.functional.pad(x, [5] * 4)
    inner = (..., slice(5, -5), slice(5, -5))
    expected = np.stack([[by_scipy(c, 2.0, 1.0, 30.0) for c in image] for image in padded.numpy()])[inner]
    with_padding = RotationTranslation(padding=5).moved(x, move)
    torch.testing.assert_close(with_padding, torch.from_numpy(expected), atol=1e-12, rtol=0)
    assert not torch.allclose(with_padding, RotationTranslation().moved(x, move))


def test_whole_pixels_shift_the_array_and_no_movement_returns_it_to_the_last_bit() -> None:
    x = images().float()
    still, by = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[2.0, -3.0, 0.0]], dtype=torch.float64)
    assert torch.equal(SMALL.moved(x, still), x)
    expected = torch.zeros_like(x)
    expected[:, :, 2:, :-3] = x[:, :, :-2, 3:]
    assert torch.equal(SMALL.moved(x, by), expected)


def test_records_may_each_have_a_movement_of_their_own() -> None:
    x, moves = images(), torch.tensor([[0.5, 1.0, 10.0], [0.0, 0.0, 0.0], [-1.0, 2.0, -25.0]], dtype=torch.float64)
    together = SMALL.moved(x, moves)
    for number in range(3):
        alone = SMALL.moved(x[number : number + 1], moves[number : number + 1])
        assert torch.equal(together[number : number + 1], alone)


def test_bilinear_reading_can_be_differentiated_in_the_image() -> None:
    x = images(4, 1, 1).requires_grad_()
    rows, columns = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6 - 1
    assert torch.autograd.gradcheck(lambda image: bilinear(image, rows, columns), x)


def test_the_set_is_the_published_grid_and_holds_the_image() -> None:
    grid = torch.cat(RotationTranslation().grid())
    assert grid.shape == (775, 3)
    assert sorted(set(grid[:, 0].tolist())) == [-3.0, -1.5, 0.0, 1.5, 3.0]
    assert len(set(grid[:, 2].tolist())) == 31
    assert float(grid[:, 2].max()) == 30.0
    assert bool((grid == 0).all(1).any())


def test_what_the_set_returns_lies_in_it_and_its_nearest_point_is_found() -> None:
    x, draw = images(6).float(), torch.Generator().manual_seed(2)
    start = SMALL.random_start(x, draw)
    assert bool(SMALL.contains(start, x).all())
    assert bool(SMALL.contains(x, x).all())
    assert torch.equal(SMALL.project(start, x), start)
    assert not bool(SMALL.contains(start + 1e-7, x).any())
    anything = torch.rand(x.shape, generator=draw)
    nearest = SMALL.project(anything, x)
    distances = torch.stack([(SMALL.moved(x, m) - anything).flatten(1).norm(dim=1) for m in SMALL.grid()])
    torch.testing.assert_close((nearest - anything).flatten(1).norm(dim=1), distances.amin(0))
    assert len(set(distances.argmin(0).tolist())) > 1 or len(x) == 1


def test_scaling_scales_the_limits_and_at_zero_only_the_image_is_left() -> None:
    half = SMALL.scaled(0.5)
    torch.testing.assert_close(torch.cat(half.grid()), 0.5 * torch.cat(SMALL.grid()))
    x = images(5).float()
    assert all(torch.equal(SMALL.scaled(0.0).moved(x, moves), x) for moves in SMALL.scaled(0.0).grid())
    assert bool((half.random_moves(x).abs() <= torch.tensor([1.0, 1.0, 10.0])).all())


def test_the_search_finds_exactly_the_points_that_some_transform_breaks(
    plain_net: nn.Module, test_points: Points
) -> None:
    threat = RotationTranslation(shift=0.5, angle=10.0, shifts=3, angles=5)
    x, y = test_points.x[:60], test_points.y[:60]
    broken = torch.stack([plain_net(threat.moved(x, moves)).argmax(1) != y for moves in threat.grid()]).any(0)
    found = RotationTranslationSearch(threat).run(plain_net, x, y)
    assert torch.equal(found.broken, broken)
    assert 10 < int(broken.sum()) < 60
    assert bool(threat.contains(found.x_adv, x).all())
    some = RotationTranslationSearch(threat, draws=4).run(plain_net, x, y)
    assert bool((~some.broken | broken).all())
    assert int((plain_net(x).argmax(1) != y).sum()) < int(some.broken.sum()) < int(broken.sum())


def test_the_worst_transform_is_a_wrong_one_before_the_one_with_the_highest_loss() -> None:
    """Three images of the same record: right, wrong with a small loss, right with a larger one."""
    x, y = torch.full((1, 1, 3, 3), 0.5), torch.tensor([0])
    tries = [torch.tensor([[0.0, 0.0, float(a)]], dtype=torch.float64) for a in range(3)]
    logits = iter([[3.0, 0.0, -9.0], [1.0, 1.1, -9.0], [1.0, 0.99, 0.99]])
    losses = [float(cross_entropy(torch.tensor([row]), y)) for row in ([1.0, 1.1, -9.0], [1.0, 0.99, 0.99])]
    assert losses[0] < losses[1]
    best = worst_transform(lambda _: torch.tensor([next(logits)]), SMALL, x, y, tries)
    assert torch.equal(best, SMALL.moved(x, tries[1]))


@pytest.mark.parametrize(
    "wrong", [{"shift": -1.0}, {"angle": -1.0}, {"shifts": 4}, {"angles": 0}, {"padding": -1}, {"eps": -1.0}]
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        RotationTranslation(**wrong)


def test_attacks_that_follow_gradients_say_what_to_use_instead(plain_net: nn.Module, test_points: Points) -> None:
    with pytest.raises(BadValue, match="rotation_translation_search"):
        PGD(SMALL).run(plain_net, test_points.x[:2], test_points.y[:2])
    with pytest.raises(BadValue, match="give it that threat"):
        RotationTranslationSearch(Linf(0.1))
    with pytest.raises(BadValue, match="draws=0"):
        RotationTranslationSearch(SMALL, draws=0)
    with pytest.raises(BadValue, match=r"need images \[B, C, H, W\]"):
        SMALL.moved(torch.rand(2, 5), torch.zeros(1, 3))


def test_a_recipe_can_name_it() -> None:
    assert build("threats", {"name": "rotation_translation", "shift": 2, "angle": 20}) == RotationTranslation(2, 20)
