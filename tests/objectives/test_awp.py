"""Adversarial weight perturbation against the authors' procedure done by hand on a copy of the network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from trivet.errors import BadValue
from trivet.objectives.awp import Awp
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.trades import Trades
from trivet.threats.linf import Linf


def by_proxy(model, loss, gamma):
    """The perturbed network and v, with a proxy network and one SGD step on the negated loss."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), 0.01)
    (-loss(proxy)).backward()
    optimizer.step()
    moved, shift = copy.deepcopy(model), {}
    with torch.no_grad():
        for (name, old), new in zip(moved.named_parameters(), proxy.parameters(), strict=True):
            if "weight" in name and old.ndim > 1:
                difference = new - old
                shift[name] = gamma * old.norm() / (difference.norm() + 1e-20) * difference
                old.add_(shift[name])
    return moved, shift


def test_gradient_loss_and_buffers_are_those_of_the_procedure_by_hand(convnet, batch, progress, gradients) -> None:
    objective = Awp(PgdAt(Linf(0.1), steps=3), gamma=0.05)
    x_adv = objective.perturb(convnet, batch, progress)
    moved, shift = by_proxy(convnet, lambda net: F.cross_entropy(net(x_adv), batch.labels), 0.05)
    expected = F.cross_entropy(moved(x_adv), batch.labels, reduction="none")

    for name, v in objective.shift(convnet, batch, x_adv, progress).items():
        assert torch.allclose(v, shift[name], rtol=1e-2, atol=1e-5)
    found = objective.losses(convnet, batch, x_adv, progress).per_example
    assert torch.allclose(found, expected, rtol=1e-3)
    for ours, theirs in zip(gradients(convnet, found), gradients(moved, expected), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4)
    for ours, theirs in zip(convnet.buffers(), moved.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)  # moved once, at theta + v


def test_the_weights_are_bitwise_what_they_were(convnet, batch, progress) -> None:
    before = copy.deepcopy(convnet)
    Awp(Trades(Linf(0.1), steps=2))(convnet, batch, progress).per_example.mean().backward()
    for ours, theirs in zip(convnet.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_error_inside_leaves_the_weights_in_place(convnet, batch, progress) -> None:
    held = list(convnet.parameters())
    with pytest.raises(IndexError):
        Awp(Plain()).losses(convnet, type(batch)(batch.inputs, batch.labels + 9, batch.index), batch.inputs, progress)
    assert all(a is b for a, b in zip(convnet.parameters(), held, strict=True))


def test_each_shift_has_gamma_times_the_norm_of_its_tensor_and_only_weights_are_shifted(
    convnet, batch, progress
) -> None:
    shift = Awp(Plain(), gamma=0.03).shift(convnet, batch, batch.inputs, progress)
    assert set(shift) == {"0.weight", "4.weight"}  # no biases, no BatchNorm
    for name, v in shift.items():
        assert float(v.norm()) == pytest.approx(0.03 * float(convnet.get_parameter(name).detach().norm()), rel=1e-5)


def test_the_loss_rises_by_the_first_order_amount_at_the_shifted_weights(mlp, batch, progress) -> None:
    at_theta = Plain()(mlp, batch, progress).per_example.mean()
    weights = [mlp[1].weight, mlp[3].weight]
    gradient = torch.autograd.grad(at_theta, weights)
    rise = sum(float(w.detach().norm() * g.norm()) for w, g in zip(weights, gradient, strict=True))
    found = Awp(Plain(), gamma=0.01)(mlp, batch, progress).per_example.mean()
    assert float((found - at_theta).detach()) == pytest.approx(0.01 * rise, rel=0.1)
    assert rise > 0


def test_with_gamma_zero_or_before_its_epoch_it_is_the_objective_alone(mlp, batch) -> None:
    early, late = Progress(0, 100, 9.9, seed=1), Progress(0, 100, 10.0, seed=1)
    alone = Trades(Linf(0.1), steps=2)
    expected = alone(mlp, batch, early).per_example
    assert torch.equal(Awp(alone, gamma=0.0)(mlp, batch, late).per_example, expected)
    assert torch.equal(Awp(alone, gamma=0.05, warmup_epochs=10)(mlp, batch, early).per_example, expected)
    assert not torch.equal(Awp(alone, gamma=0.05, warmup_epochs=10)(mlp, batch, late).per_example, expected)


class _Mask(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def test_pruned_weights_stay_pruned_and_the_trained_tensor_behind_a_mask_is_shifted(mlp, batch, progress) -> None:
    mask = (torch.rand_like(mlp[1].weight) > 0.5).float()
    parametrize.register_parametrization(mlp[1], "weight", _Mask(mask))
    shift = Awp(Plain(), gamma=0.1).shift(mlp, batch, batch.inputs, progress)
    assert set(shift) == {"1.parametrizations.weight.original", "3.weight"}
    assert (shift["1.parametrizations.weight.original"][mask == 0] == 0).all()


def test_frozen_layers_are_not_shifted_and_a_model_without_weights_is_refused(mlp, batch, progress) -> None:
    mlp[1].requires_grad_(False)
    assert set(Awp(Plain()).shift(mlp, batch, batch.inputs, progress)) == {"3.weight"}
    mlp.requires_grad_(False)
    with pytest.raises(BadValue, match="no trained weight"):
        Awp(Plain()).shift(mlp, batch, batch.inputs, progress)


def test_it_shows_the_threat_it_trains_against() -> None:
    assert Awp(PgdAt(Linf(0.1))).threat == Linf(0.1)
    assert Awp(Plain()).threat is None
