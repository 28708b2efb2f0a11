"""Stable attributions on networks deep enough that nothing is proved: what the search finds, and what training does."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.models.attribution import integrated_gradients
from trivet.objectives.plain import Plain
from trivet.objectives.stable_ig import StableIG
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy

THREAT = Linf(0.1)


def test_the_loss_is_the_clean_one_and_the_norm_at_the_perturbed_point(mlp, exact_batch, progress) -> None:
    objective, net = StableIG(THREAT, weight=2.0, points=7), mlp.double()
    x, y = exact_batch.inputs, exact_batch.labels
    x_adv = objective.perturb(net, exact_batch, progress)
    attribution = integrated_gradients(lambda points: cross_entropy(net(points), y), x_adv, x, 7)
    expected = cross_entropy(net(x), y) + 2.0 * attribution.abs().flatten(1).sum(1)
    torch.testing.assert_close(objective.losses(net, exact_batch, x_adv, progress).per_example, expected)


@pytest.mark.parametrize("threat", [THREAT, L2(0.5)], ids=["Linf", "L2"])
def test_the_search_stays_in_the_set_and_finds_no_less_than_its_start_and_random_points(
    threat, mlp, batch, progress
) -> None:
    def norm(x_adv: torch.Tensor) -> torch.Tensor:
        return StableIG(threat).losses(mlp, batch, x_adv, progress).log["attribution"]

    start, found = (StableIG(threat, steps=steps).perturb(mlp, batch, progress) for steps in (0, 5))
    assert threat.contains(found, batch.inputs).all()
    assert not found.requires_grad
    assert (norm(found) >= norm(start) - 1e-6).all()
    assert (norm(found) > norm(start) + 1e-6).any()
    for seed in range(5):
        point = threat.random_start(batch.inputs, torch.Generator().manual_seed(seed))
        assert (norm(found) > norm(point)).all()


def test_attributions_are_those_of_eval_mode_and_the_clean_loss_that_of_training(convnet, batch, progress) -> None:
    """A record's attribution does not depend on the others even where BatchNorm couples their losses."""
    objective = StableIG(THREAT)
    convnet[1].momentum = 0.0  # the running statistics stay
    whole = objective(convnet, batch, progress)
    first = objective(convnet, batch.select(slice(0, 2)), progress)
    torch.testing.assert_close(first.log["attribution"], whole.log["attribution"][:2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first.log["natural"], whole.log["natural"][:2])


def test_gradients_of_single_records_can_be_taken_by_vmap(mlp, exact_batch, progress) -> None:
    objective, net = StableIG(THREAT), mlp.double()
    x_adv = objective.perturb(net, exact_batch, progress)
    values = {name: value.detach() for name, value in net.named_parameters()}

    def of_one(values, x, y, index, point):
        def call(inputs):
            return functional_call(net, values, (inputs,))

        class Bound(torch.nn.Module):
            def forward(self, inputs):
                return call(inputs)

        one = Batch(x[None], y[None], index[None])
        return objective.losses(Bound(), one, point[None], progress).per_example[0]

    each = vmap(grad(of_one), in_dims=(None, 0, 0, 0, 0))(
        values, exact_batch.inputs, exact_batch.labels, exact_batch.index, x_adv
    )
    net.zero_grad()
    objective.losses(net, exact_batch, x_adv, progress).per_example.sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_training_with_it_makes_attributions_of_the_loss_smaller(mlp, batch, progress) -> None:
    objective = StableIG(THREAT, weight=3.0)
    before = objective(mlp, batch, progress).log["attribution"].mean()
    optimizer = torch.optim.Adam(mlp.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        objective(mlp, batch, progress).per_example.mean().backward()
        optimizer.step()
    assert objective(mlp, batch, progress).log["attribution"].mean() < 0.5 * before


def test_without_weight_it_is_plain_training(mlp, batch, progress) -> None:
    found, plain = (each(mlp, batch, progress).per_example for each in (StableIG(THREAT, weight=0.0), Plain()))
    assert torch.equal(found, plain)


@pytest.mark.parametrize("setting", [{"weight": -1.0}, {"steps": -1}, {"points": 0}])
def test_wrong_settings_are_refused(setting) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(setting))}="):
        StableIG(THREAT, **setting)
