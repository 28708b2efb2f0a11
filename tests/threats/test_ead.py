"""EAD against exact l_1 distances, its inner step against a search of the line, and another library's iterates."""

from __future__ import annotations

import warnings

import pytest
import torch
from closed_forms import Linear, Points
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.methods import build
from trivet.threats.attack import Target
from trivet.threats.ead import EAD, shrunk
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2


def linear_points(model: nn.Module, count: int = 20) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, model(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 4])
def test_on_a_linear_model_it_comes_near_the_least_l_1_distance(classes: int) -> None:
    model = Linear(classes)
    x, y = linear_points(model)
    found, distance = EAD(L1(1.0), steps=100).nearest(Target(model, model), x, y)
    exact = model.boxed_distances(x, y, "L1").amin(1)
    assert bool((distance >= exact * (1 - 1e-5)).all())
    assert float((distance / exact).max()) < 1.15
    assert float((distance / exact).median()) < 1.06
    assert bool((model(found).argmax(1) != y).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    torch.testing.assert_close((found - x).flatten(1).abs().sum(1), distance)


def test_within_a_radius_it_breaks_only_points_that_are_nearer() -> None:
    model = Linear(2)
    x, y = linear_points(model, 40)
    exact = model.boxed_distances(x, y, "L1").amin(1)
    eps = float(exact.median())
    broken = EAD(L1(eps), steps=100).run(model, x, y).broken
    assert not bool(broken[exact > eps * (1 + 1e-5)].any())
    assert bool(broken[exact < 0.9 * eps].all())


def test_the_l_1_cost_leaves_most_pixels_alone(robust_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:15]
    y = robust_net(x).argmax(1)
    target = Target(robust_net, robust_net)
    (sparse, near), (dense, far) = (EAD(L1(1.0), steps=60, beta=beta).nearest(target, x, y) for beta in (0.01, 0.0))
    changed = [(found != x).flatten(1).sum(1).float() for found in (sparse, dense)]
    assert bool(near.isfinite().all())
    assert float(changed[0].mean()) < 0.5 * float(changed[1].mean())
    assert float(near.mean()) < 0.8 * float(far.mean())


@given(st.floats(-2, 3, width=32), st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_the_inner_step_is_a_minimum_over_the_box(point: float, x: float, beta: float, other: float) -> None:
    def cost(value: float) -> float:
        return (value - point) ** 2 / 2 + beta * abs(value - x)

    here = float(shrunk(*torch.tensor([[point], [x]], dtype=torch.float64), beta))
    assert 0 <= here <= 1
    assert cost(here) <= cost(other) + 1e-12


def test_another_library_comes_to_the_same_points(plain_net: nn.Module, test_points: Points) -> None:
    """The same c, steps and rule: distances agree within 1e-3 of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox

    x = test_points.x[:12]
    y = plain_net(x).argmax(1)
    theirs = foolbox.attacks.EADAttack(binary_search_steps=6, steps=50, decision_rule="L1", abort_early=False)
    reached = theirs.run(foolbox.PyTorchModel(plain_net, bounds=(0, 1), device="cpu"), x, y)
    _, distance = EAD(L1(1.0), steps=50, searches=6).nearest(Target(plain_net, plain_net), x, y)
    torch.testing.assert_close(distance, (reached - x).flatten(1).abs().sum(1), rtol=1e-3, atol=1e-4)


def test_with_a_margin_the_point_lies_beyond_the_boundary() -> None:
    model = Linear(2)
    x, y = linear_points(model)
    found, distance = EAD(L1(1.0), steps=100, kappa=0.1).nearest(Target(model, model), x, y)
    logits = model(found)
    lead = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    assert int(distance.isfinite().sum()) >= 10
    assert float(lead[distance.isfinite()].min().detach()) > 0.1


def test_a_recipe_names_it_and_wrong_settings_are_refused() -> None:
    assert build("threats", {"name": "ead", "steps": 7}, threat=L1(2.0)) == EAD(L1(2.0), steps=7)
    with pytest.raises(BadValue, match="EAD minimises the l_1 norm; choose l1"):
        EAD(L2(0.1))
    for wrong in (
        {"steps": 0},
        {"searches": 0},
        {"samples": 0},
        {"lr": 0.0},
        {"c": 0.0},
        {"beta": -1.0},
        {"kappa": -1},
    ):
        with pytest.raises(BadValue, match=next(iter(wrong))):
            EAD(L1(1.0), **wrong)
