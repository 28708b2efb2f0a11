"""The one-layer theorems of Chalasani et al. held against brute force, autograd and simulation."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.models.attribution import integrated_gradients
from trivet.models.normalize import Normalize
from trivet.objectives.objective import Progress
from trivet.objectives.one_layer import weights, worst_loss, worst_margin
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.stable_ig import StableIG
from trivet.threats.linf import Linf
from trivet.threats.losses import margin

EPS = 0.1
D = 6
START = Progress(step=0, steps=1, epoch=0.0, seed=0)


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(classes)
    net = nn.Sequential(Normalize([0.4], [0.3]), nn.Flatten(), nn.Linear(D, classes)).double()
    net[2].weight.data *= 3
    return net


def records(classes: int) -> tuple[Tensor, Tensor]:
    """Inputs [B, 1, 2, 3] so far inside [0, 1] that it cuts no ball."""
    generator = torch.Generator().manual_seed(9)
    x = 0.2 + 0.6 * torch.rand(8, 1, 2, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(8) % classes


def vertices() -> Tensor:
    """All 2^D corners of the ball, [2^D, 1, 2, 3]."""
    return EPS * torch.tensor(list(product([-1.0, 1.0], repeat=D)), dtype=torch.float64).view(-1, 1, 2, 3)


def objective(weight: float = 1.0, steps: int = 0, points: int = 400) -> StableIG:
    return StableIG(Linf(EPS), weight=weight, steps=steps, points=points)


def losses_of(net: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, reduction="none")


def losses(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return losses_of(net, y, x).detach()


def test_the_weights_are_those_of_the_inputs_whatever_normalises_them() -> None:
    net, (x, _) = network(3), records(3)
    W, b = weights(net, (1, 2, 3))
    torch.testing.assert_close(x.flatten(1) @ W.T + b, net(x))


def test_the_closed_form_is_the_largest_loss_over_all_corners_and_nothing_inside_is_worse() -> None:
    net, (x, y) = network(2), records(2)
    found = worst_loss(net, x, y, EPS).detach()
    corners = torch.stack([losses(net, x + each, y) for each in vertices()])
    torch.testing.assert_close(found, corners.amax(0))
    inside = torch.stack([losses(net, x + EPS * (2 * torch.rand_like(x) - 1), y) for _ in range(200)])
    assert (inside <= found).all()


def test_adversarial_training_of_one_layer_minimises_the_closed_form() -> None:
    net, (x, y) = network(2), records(2)
    attacked = PgdAt(Linf(EPS), steps=10)(net, Batch(x, y, torch.arange(8)), START).per_example
    torch.testing.assert_close(attacked, worst_loss(net, x, y, EPS), rtol=1e-5, atol=1e-7)


def test_its_gradient_is_the_closed_form_and_that_at_the_perturbed_point() -> None:
    """d/dw g(u) = sigmoid(u) (-s x + eps sign(w)), u = -s w.x + eps ||w||_1."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(D, 2)).double()
    x, y = records(2)
    s = (2 * y - 1).double()[:, None]
    worst_loss(net, x, y, EPS).sum().backward()
    found = net[1].weight.grad.clone()
    w, b = (net[1].weight[1] - net[1].weight[0]).detach(), (net[1].bias[1] - net[1].bias[0]).detach()
    rows = x.flatten(1)
    u = -s[:, 0] * (rows @ w + b) + EPS * w.abs().sum()
    expected = (torch.sigmoid(u)[:, None] * (-s * rows + EPS * w.sign())).sum(0)
    torch.testing.assert_close(found, torch.stack([-expected, expected]))
    net.zero_grad()
    F.cross_entropy(net(x - (s * EPS * w.sign()).view_as(x)), y, reduction="sum").backward()
    torch.testing.assert_close(net[1].weight.grad, found)


def test_training_with_stable_attributions_is_adversarial_training() -> None:
    """(4) of the paper, at the maximum the objective finds by itself; the midpoint sum errs below 1e-5."""
    net, (x, y) = network(2), records(2)
    found = objective()(net, Batch(x, y, torch.arange(8)), START).per_example
    torch.testing.assert_close(found, worst_loss(net, x, y, EPS), rtol=0, atol=1e-5)


def test_the_largest_norm_of_attributions_over_all_corners_is_the_rise_of_the_loss() -> None:
    net, (x, y) = network(2), records(2)

    def norm(shifts: Tensor) -> Tensor:
        """At x + each shift [S, 1, 2, 3], for all records: [S, 8]."""
        start, labels = x.repeat(len(shifts), 1, 1, 1), y.repeat(len(shifts))
        point = start + shifts.repeat_interleave(len(x), 0)
        loss = partial(losses_of, net, labels)
        return integrated_gradients(loss, point, start, 100).abs().flatten(1).sum(1).detach().view(len(shifts), -1)

    rise = worst_loss(net, x, y, EPS).detach() - losses(net, x, y)
    torch.testing.assert_close(norm(vertices()).amax(0), rise, rtol=0, atol=1e-5)
    assert (norm(EPS * (2 * torch.rand(50, 1, 2, 3, dtype=torch.float64) - 1)) < rise).all()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_worst_margin_is_that_of_the_worst_corner(classes: int) -> None:
    net, (x, y) = network(classes), records(classes)
    corners = torch.stack([margin(net(x + each), y).detach() for each in vertices()])
    torch.testing.assert_close(worst_margin(net, x, y, EPS).detach(), corners.amax(0))


def test_where_the_box_cuts_the_ball_the_closed_form_is_an_upper_bound() -> None:
    net, (x, y) = network(2), records(2)
    edge = x.round()
    attacked = PgdAt(Linf(EPS), steps=10)(net, Batch(edge, y, torch.arange(8)), START).per_example
    assert (attacked < worst_loss(net, edge, y, EPS)).all()


def test_the_first_step_drives_features_weaker_than_the_radius_to_zero() -> None:
    """(2): of features x = a y + noise the drift of w_i > 0, small, is gbar (a_i - eps), gbar = 1/2.

    Means of 400,000 draws, each with deviation below 0.9 (half a unit normal and the mean's spread): the error stays
    below 0.01 but for odds under 1e-9 a feature.
    """
    a, eps, n = torch.tensor([0.8, 0.3, 0.1, 0.0], dtype=torch.float64), 0.2, 400_000
    generator = torch.Generator().manual_seed(4)
    y = torch.randint(2, (n,), generator=generator)
    x = (2 * y - 1)[:, None] * a + torch.randn(n, 4, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    net[1].weight.data = torch.stack([torch.zeros(4), torch.full((4,), 1e-3)]).double()
    worst_loss(net, x.view(n, 1, 1, 4), y, eps).mean().backward()
    drift = -net[1].weight.grad[1]
    torch.testing.assert_close(drift, 0.5 * (a - eps), rtol=0, atol=0.01)


def test_other_models_are_refused_because_nothing_is_proved_of_them() -> None:
    x, y = records(2)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with pytest.raises(BadValue, match="one linear layer; this model has 2, and ReLU besides"):
        worst_loss(deep, x, y, EPS)
    with pytest.raises(BadValue, match="2 classes, not for 3"):
        worst_loss(network(3), x, y, EPS)
