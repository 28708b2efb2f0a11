"""TAPS: equal to IBP while the radius grows and where the classifier is linear; its link and its latent points."""

from __future__ import annotations

import pytest
import torch
from interval_rules import ball, by_hand, merged_margins, worst_loss
from torch import nn

from trivet.errors import BadValue
from trivet.objectives.certified import Step, layers, network_of
from trivet.objectives.ibp import Ibp
from trivet.objectives.objective import Progress
from trivet.objectives.sabr import Sabr
from trivet.objectives.taps import Taps, _Linked, split_node
from trivet.threats.linf import Linf

END = Progress(step=9, steps=10, epoch=9.0, seed=7)
GROWING = Progress(step=1, steps=10, epoch=1.0, seed=7)
EPS = 0.05


def test_while_the_radius_grows_it_is_ibp(rectified, exact_batch) -> None:
    ours = Taps(Linf(EPS), ramp=(0.0, 0.5))(rectified, exact_batch, GROWING).per_example
    ibp = Ibp(Linf(EPS), ramp=(0.0, 0.5), kappa_end=0.0)(rectified, exact_batch, GROWING).per_example
    torch.testing.assert_close(ours, ibp)


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_through_a_linear_classifier_attacks_find_the_interval_bound_and_send_its_gradient(
    steps, rectified, exact_batch, gradients
) -> None:
    """PGD ends in the right corner of the box: loss CE^2, gradient (weight + 1) CE dCE."""
    objective = Taps(Linf(EPS), activations=0, weight=3.0, latent_steps=steps)
    found = objective(rectified, exact_batch, END).per_example
    margins = merged_margins(rectified, *ball(exact_batch, EPS), exact_batch.labels)
    loss = worst_loss(margins)
    torch.testing.assert_close(found, loss.square())
    for ours, theirs in zip(gradients(rectified, found), gradients(rectified, 4.0 * loss.detach() * loss), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attacks_through_a_deeper_classifier_lie_between_clean_and_interval_losses(rectified, exact_batch) -> None:
    """And more steps find more, up to what is there."""
    interval = worst_loss(merged_margins(rectified, *ball(exact_batch, EPS), exact_batch.labels))
    clean = nn.functional.cross_entropy(rectified(exact_batch.inputs), exact_batch.labels, reduction="none")
    factors = []
    for count in (0, 1, 2):
        found = Taps(Linf(EPS), activations=count)(rectified, exact_batch, END).per_example
        factors.append(found / interval)
    assert (factors[1] < factors[0] - 1e-4).all()
    assert (factors[2] < factors[1] - 1e-4).all()
    assert (factors[2] > clean).all()


def test_latent_attacks_stay_in_the_box_and_mostly_find_what_random_corners_do_not(rectified, exact_batch) -> None:
    """Never below the intervals of the classifier; against 2000 random corners of the latent box."""
    network = network_of(rectified, (2, 4, 4))
    step = Step(rectified, network, exact_batch, exact_batch.inputs, EPS, 1.0, END)
    split = split_node(network, 1)
    assert split == 4
    box = network.intervals(step.box)[split]
    found = Taps(Linf(EPS))._found(step, layers(network)[split:], split, box).detach()
    ends = by_hand(rectified[:4], *ball(exact_batch, EPS))[-1]
    below = merged_margins(rectified[4:], *ends, exact_batch.labels)
    assert (found >= below - 1e-12).all()
    lower, upper = (each.detach() for each in ends)
    least = torch.full_like(found, torch.inf)
    for _ in range(2000):
        logits = rectified[4:](lower + (upper - lower) * torch.rand_like(lower).round()).detach()
        margins = (step.rows @ logits[:, :, None]).squeeze(2)
        least = torch.minimum(least, margins)
    assert (found <= least + 0.02).all()
    assert (found <= least + 1e-9).double().mean() > 0.7


def test_the_link_weighs_gradients_by_the_distance_from_the_ends_and_stops_halfway() -> None:
    low = torch.zeros(5, 1, dtype=torch.float64, requires_grad=True)
    high = torch.full((5, 1), 2.0, dtype=torch.float64, requires_grad=True)
    point = torch.tensor([[0.0], [0.5], [1.0], [1.75], [2.0]]).double()
    out = _Linked.apply(low, high, point)
    assert torch.equal(out, point)
    (out * torch.tensor([[1.0], [1.0], [1.0], [-2.0], [3.0]]).double()).sum().backward()
    assert low.grad.flatten().tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert high.grad.flatten().tolist() == [0.0, 0.0, 0.0, -1.5, 3.0]


def test_boxes_without_width_give_finite_gradients(rectified, exact_batch, gradients) -> None:
    found = Taps(Linf(1e-30), activations=1)(rectified, exact_batch, END).per_example
    assert all(each.isfinite().all() for each in gradients(rectified, found))


def test_staps_bounds_the_small_box_of_sabr(rectified, exact_batch) -> None:
    """With a linear classifier it is the square of SABR's loss, at the same point."""
    sabr = Sabr(Linf(EPS), lam=0.4, steps=3)(rectified, exact_batch, END).per_example
    staps = Taps(Linf(EPS), lam=0.4, steps=3, activations=0)(rectified, exact_batch, END).per_example
    torch.testing.assert_close(staps, sabr.square())


def test_networks_are_split_behind_a_relu_but_not_inside_a_residual_block(rectified) -> None:
    network = network_of(rectified, (2, 4, 4))
    assert [split_node(network, count) for count in range(4)] == [7, 4, 2, 0]
    with pytest.raises(BadValue, match="activations=4 must be at most 3"):
        split_node(network, 4)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.first(x.flatten(1)).relu()
            return self.last((inner + self.second(inner).relu()).relu())

    residual = network_of(Residual(), (2, 4, 4))
    assert split_node(residual, 0) > split_node(residual, 2)
    with pytest.raises(BadValue, match="activations=1 splits this network inside a residual block"):
        split_node(residual, 1)


@pytest.mark.parametrize("wrong", [{"activations": -1}, {"weight": -1.0}, {"latent_steps": 0}, {"lam": 2.0}])
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        Taps(Linf(0.1), **wrong)
