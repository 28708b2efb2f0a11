"""Square: what it proposes, that it needs no gradient, and that it sees through a model that hides them."""

from __future__ import annotations

import warnings

import pytest
import torch
from closed_forms import Linear, Points
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats import square
from trivet.threats.attack import Target
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import margin
from trivet.threats.pgd import PGD
from trivet.threats.square import Square
from trivet.threats.threat import ThreatModel

threats = pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)], ids=lambda t: t.norm)


class Rounded(nn.Module):
    """The net behind a rounding of its input, which has a gradient of zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 16).round() / 16)


def test_rounding_that_stops_gradients_does_not_stop_square(plain_net: nn.Module, test_points: Points) -> None:
    model, x, y = Rounded(plain_net), test_points.x[:80], test_points.y[:80]
    by_gradient = PGD(Linf(0.1), steps=20).run(model, x, y).broken
    by_score = Square(Linf(0.1), queries=300).run(model, x, y).broken
    assert int(by_score.sum()) > int(by_gradient.sum()) + 10


@threats
def test_more_queries_raise_the_margin(threat: ThreatModel, robust_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:30]
    y = robust_net(x).argmax(1)
    target = Target(robust_net, robust_net)
    means = []
    for queries in (0, 20, 200):
        found = Square(threat, queries=queries).search(target, x, y, torch.Generator().manual_seed(0))
        assert bool(threat.contains(found, x).all())
        means.append(margin(robust_net(found), y).mean().item())
    assert means[0] < means[1] < means[2]


def test_one_pixel_of_a_linear_model_is_brought_to_its_worst_corner() -> None:
    model = Linear(2, side=2)
    model.bias.data[0] = 5.0
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    found = Square(Linf(0.2), queries=400, p_init=0.3).search(Target(model, model), x, y)
    slope = (model.weight[1] - model.weight[0]).sign().view(2, 2)
    torch.testing.assert_close(found, (x + 0.2 * slope).detach(), atol=1e-6, rtol=0)


def test_windows_reach_every_pixel_and_shrink_as_scheduled() -> None:
    x = torch.full((1, 1, 6, 6), 0.5)
    proposal = square._PROPOSALS["Linf"](Linf(0.1), x, torch.Generator().manual_seed(0))
    touched, areas = torch.zeros(6, 6), []
    for area in (0.8, 0.1, 0.01):
        for place in torch.rand(60, 4).tolist():
            change = proposal.change(x, area, place) != x
            areas.append((area, int(change.sum())))
            touched += change[0, 0]
    assert bool((touched > 0).all())
    assert set(areas) == {(0.8, 25), (0.1, 4), (0.01, 1)}


@pytest.mark.parametrize(("norm", "p"), [("L2", 2.0), ("L1", 1.0)])
@pytest.mark.parametrize("side", [1, 2, 3, 6, 9])
def test_bumps_have_length_one_and_fall_off_from_two_centres(norm: str, p: float, side: int) -> None:
    threat: ThreatModel = L2(1.0) if norm == "L2" else L1(1.0)
    bump = square._Bumps(threat, torch.zeros(1, 1, side, side), torch.Generator().manual_seed(0)).bump(side)
    assert bump.shape == (side, side)
    assert float(torch.linalg.vector_norm(bump, ord=p)) == pytest.approx(1.0, abs=1e-5)
    if side >= 2:
        assert float(bump.max()) > 0 > float(bump.min())


@pytest.mark.parametrize("threat", [L2(0.5), L1(2.0)], ids=lambda t: t.norm)
@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (2, 1, 3, 3), (1, 1, 12, 12), (1, 2, 2, 5)])
def test_images_of_any_shape_are_tiled_and_changed_within_the_set(
    threat: ThreatModel, shape: tuple[int, int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator)
    proposal = square._Bumps(threat, x, generator)
    point = proposal.start()
    assert bool(((point != x).flatten(1).sum(1) > 0).all())
    for place in torch.rand(20, 4, generator=generator).tolist():
        point = proposal.change(point, 0.3, place)
        assert bool(threat.contains(point, x).all())


def test_other_geometries_are_refused() -> None:
    class Spiral(Linf):
        norm = "spiral"

    with pytest.raises(BadValue, match="not spiral"):
        Square(Spiral(0.1))


@pytest.mark.slow
@pytest.mark.usefixtures("reference")
@threats
def test_it_is_no_weaker_than_the_authors_code(threat: ThreatModel, plain_net: nn.Module, test_points: Points) -> None:
    from autoattack.square import SquareAttack

    x, y = test_points.x[:120], test_points.y[:120]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SquareAttack(plain_net, norm=threat.norm, eps=threat.eps, n_queries=500, resc_schedule=False).perturb(
            x, y
        )
    expected = int((plain_net(theirs).argmax(1) != y).sum())
    assert int(Square(threat, queries=500).run(plain_net, x, y).broken.sum()) >= expected - 3
