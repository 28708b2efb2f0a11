"""C&W against the closed form of linear models, and scaled logits against a saturated softmax."""

from __future__ import annotations

import pytest
import torch
from closed_forms import Linear
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats.attack import Target
from trivet.threats.carlini_wagner import CarliniWagner
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.logit_scaled import LogitScaledPGD
from trivet.threats.pgd import PGD


def points(model: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, model(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 4])
def test_on_a_linear_model_it_finds_the_distance_to_the_nearest_boundary(classes: int) -> None:
    model = Linear(classes)
    x, y = points(model)
    found, distance = CarliniWagner(L2(1.0), steps=200, searches=9, lr=0.02).nearest(Target(model, model), x, y)
    true = model.distances(x, y, "L2").min(1).values
    assert bool((distance >= true - 1e-4).all())
    assert float((distance / true).max()) < 1.05
    assert bool((model(found).argmax(1) != y).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    torch.testing.assert_close((found - x).flatten(1).norm(dim=1), distance, atol=1e-5, rtol=1e-5)


def test_within_a_radius_it_breaks_just_the_points_that_are_nearer() -> None:
    model = Linear(2)
    x, y = points(model, 40)
    true = model.distances(x, y, "L2").min(1).values
    eps = float(true.median())
    broken = CarliniWagner(L2(eps), steps=200, lr=0.05).run(model, x, y).broken
    assert bool((true[broken] <= eps + 1e-5).all())
    assert bool(broken[true < 0.95 * eps].all())


def test_with_a_margin_the_point_lies_beyond_the_boundary() -> None:
    model = Linear(2)
    x, y = points(model)
    found, distance = CarliniWagner(L2(1.0), steps=200, lr=0.05, kappa=0.1).nearest(Target(model, model), x, y)
    logits = model(found)
    gap = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    assert int(distance.isfinite().sum()) >= 6
    assert float(gap[distance.isfinite()].min().detach()) > 0.1


class Saturated(nn.Module):
    """A linear model with logits so large that the softmax is exactly one-hot in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear(3)

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.inner(x)


def test_scaled_logits_break_what_a_saturated_softmax_hides() -> None:
    model = Saturated()
    x, y = points(model, 40)
    threat = Linf(0.08)
    assert float((model.inner.distances(x, y, "Linf").min(1).values < 0.08).float().mean()) > 0.4
    plain = PGD(threat, steps=10, random_start=False).run(model, x, y).broken
    scaled = LogitScaledPGD(threat, steps=10, temperatures=(1e-4,)).run(model, x, y).broken
    near = model.inner.distances(x, y, "Linf").min(1).values < 0.075
    assert bool(scaled[near].all())
    assert int(plain.sum()) < int(scaled.sum())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadValue, match="CarliniWagner minimises the l_2 norm; choose l2"):
        CarliniWagner(Linf(0.1))
    with pytest.raises(BadValue, match="kappa=-1 must not be negative"):
        CarliniWagner(L2(1.0), kappa=-1)
    with pytest.raises(BadValue, match=r"temperatures=\[\] must be positive"):
        LogitScaledPGD(Linf(0.1), temperatures=())
