"""The boundary attack: distances known on paper, another library's walk, and models that give labels and no more."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from closed_forms import Linear, Points
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.methods import build
from trivet.threats.attack import Target
from trivet.threats.boundary import Boundary
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf


def linear_points(model: nn.Module, count: int = 20) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, model(x).argmax(1)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 4])
def test_on_a_linear_model_it_comes_to_the_nearest_boundary(classes: int) -> None:
    model = Linear(classes)
    x, y = linear_points(model)
    point, distance = Boundary(L2(1.0), steps=400, restarts=3).nearest(Target(model, model), x, y, draw())
    exact = model.boxed_distances(x, y, "L2").amin(1)
    assert bool((distance >= exact * (1 - 1e-5)).all())
    assert float((distance / exact).max()) < 1.05
    assert bool((model(point).argmax(1) != y).all())
    assert float(point.min()) >= 0
    assert float(point.max()) <= 1
    torch.testing.assert_close((point - x).flatten(1).norm(dim=1), distance)


def test_within_a_radius_it_breaks_just_the_points_that_are_nearer() -> None:
    model = Linear(2)
    x, y = linear_points(model, 40)
    exact = model.boxed_distances(x, y, "L2").amin(1)
    eps = float(exact.median())
    found = Boundary(L2(eps), steps=600).run(model, x, y)
    assert not bool(found.broken[exact > eps * (1 + 1e-5)].any())
    assert bool(found.broken[exact < 0.95 * eps].all())
    # A walk ends inside the ball, and goes no further.
    length = (found.x_adv - x).flatten(1).norm(dim=1)[found.broken]
    assert float((length / exact[found.broken]).max()) > 1.1


def test_the_distance_never_grows_and_the_label_stays_wrong(robust_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:25]
    y = robust_net(x).argmax(1)
    target, last = Target(robust_net, robust_net), torch.full((25,), torch.inf)
    first = None
    for steps in (1, 2, 5, 20, 60, 150):
        point, distance = Boundary(L2(1.0), steps=steps).nearest(target, x, y, draw(3))
        assert bool(target.misclassifies(point, y).all())
        assert bool((distance <= last).all())
        first, last = distance if first is None else first, distance
    assert first is not None
    assert bool((last < first).all())
    assert float((last / first).median()) < 0.6


class LabelsOnly(nn.Module):
    """The answers of a network without its scores: there is nothing to differentiate, and no margin to follow."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(self.net(x).argmax(1), 10).to(x.dtype)


def test_it_walks_the_same_way_without_scores_or_gradients(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:30], test_points.y[:30]
    attack = Boundary(L2(1.2), steps=200)
    with_scores, without = (attack.run(net, x, y) for net in (robust_net, LabelsOnly(robust_net)))
    assert torch.equal(with_scores.x_adv, without.x_adv)
    assert torch.equal(with_scores.broken, without.broken)
    assert int(without.broken.sum()) >= 10


def test_another_seed_walks_another_way_to_about_the_same_distance(robust_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:25]
    y = robust_net(x).argmax(1)
    attack, target = Boundary(L2(1.0), steps=400), Target(robust_net, robust_net)
    (one, near), (two, also) = (attack.nearest(target, x, y, draw(seed)) for seed in (1, 2))
    assert not bool((one == two).flatten(1).all(1).any())
    assert float((near / also).median()) == pytest.approx(1.0, abs=0.1)


def test_more_walks_never_end_further_away(plain_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:20]
    y = plain_net(x).argmax(1)
    target, once = Target(plain_net, plain_net), Boundary(L2(1.0), steps=80)
    _, single = once.nearest(target, x, y, draw())
    _, triple = replace(once, restarts=3).nearest(target, x, y, draw())
    assert bool((triple <= single).all())
    assert bool((triple < 0.95 * single).any())


class Bright(nn.Module):
    """Class 1 where the mean is above 0.9, which uniform noise never is."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.flatten(1).mean(1) > 0.9).to(x.dtype)
        return torch.stack((1 - bright, bright), 1)


def test_where_noise_is_never_wrong_it_starts_from_another_label_s_input() -> None:
    model = Bright()
    x = torch.cat((torch.full((3, 1, 4, 4), 0.4), torch.full((1, 1, 4, 4), 0.97)))
    y = torch.tensor([0, 0, 0, 1])
    target, attack = Target(model, model), Boundary(L2(1.0), steps=600)
    point, distance = attack.nearest(target, x, y, draw())
    assert bool(target.misclassifies(point, y).all())
    # All pixels from 0.4 to 0.9, and from 0.97 down to it: 4 times as much in l_2.
    torch.testing.assert_close(distance, torch.tensor([2.0, 2.0, 2.0, 0.28]), rtol=0.03, atol=0.0)
    alone, nowhere = attack.nearest(target, x[:3], y[:3], draw())
    assert torch.equal(alone, x[:3])
    assert nowhere.tolist() == [torch.inf] * 3
    assert not bool(attack.run(model, x[:3], y[:3]).broken.any())


def test_another_library_s_walks_from_the_same_points_end_as_near(robust_net: nn.Module, test_points: Points) -> None:
    """10 % in the median, and the same points are near and far: rank correlation 0.7, since some walks go elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox

    x = test_points.x[:15]
    y = robust_net(x).argmax(1)
    target = Target(robust_net, robust_net)
    start, distant = Boundary(L2(1.0), steps=40).nearest(target, x, y, draw())  # where the walk below comes past
    _, distance = Boundary(L2(1.0), steps=500).nearest(target, x, y, draw())
    theirs = foolbox.attacks.BoundaryAttack(steps=500, spherical_step=0.1, source_step=0.1, update_stats_every_k=2)
    wrapped = foolbox.PyTorchModel(robust_net, bounds=(0, 1), device="cpu")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        reached = (theirs.run(wrapped, x, y, starting_points=start) - x).flatten(1).norm(dim=1)
    assert float((distance / distant).median()) < 0.7
    assert float((distance / reached).median()) == pytest.approx(1.0, abs=0.1)
    ranks = torch.stack([each.argsort().argsort().float() for each in (distance, reached)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


def test_a_recipe_names_it_and_other_geometries_are_refused() -> None:
    assert build("threats", {"name": "boundary", "steps": 7}, threat=L2(0.5)) == Boundary(L2(0.5), steps=7)
    assert Boundary.gradient_free
    with pytest.raises(BadValue, match="boundary attack minimises the l_2 norm; choose l2"):
        Boundary(Linf(0.1))
    for wrong in ({"steps": 0}, {"restarts": 0}):
        with pytest.raises(BadValue, match=next(iter(wrong))):
            Boundary(L2(1.0), **wrong)
