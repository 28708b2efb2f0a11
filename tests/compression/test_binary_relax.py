"""Binary-Relax: its two limits, its schedule, and what is judged, saved and shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from short_runs import SPLITS
from torch import nn

from trivet.compression.binary_relax import BinaryRelax
from trivet.compression.compression import Moment, steps_on
from trivet.compression.masks import Masks
from trivet.compression.ternary import Ternary
from trivet.errors import BadValue
from trivet.methods import build
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def attached(**chosen: Any) -> tuple[nn.Sequential, BinaryRelax]:
    model, compression = net(), BinaryRelax(**chosen)
    compression.attach(model)
    compression.begin(model)
    compression.initialise(model)
    return model, compression


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1e6), st.booleans())
def test_the_weight_solves_the_relaxed_problem_and_its_gradient_goes_to_the_shadow(eta: float, ternary: bool) -> None:
    """u minimises |u - w|^2 / 2 + (eta / 2) |u - Q(w)|^2: its gradient vanishes there."""
    model, compression = attached(projection=Ternary()) if ternary else attached()
    shadow, hard = net()[1].weight, compression.projection.project(net()[1].weight)
    steps_on(model[1])[0].eta.fill_(eta)
    u = model[1].weight
    torch.testing.assert_close((u - shadow) + eta * (u - hard), torch.zeros_like(u), atol=1e-6 * (1 + eta), rtol=0)
    direction = torch.randn_like(u)
    (u * direction).sum().backward()
    torch.testing.assert_close(model[1].parametrizations.weight.original.grad, direction)


def test_both_limits_are_the_weight_and_the_grid() -> None:
    model, compression = attached()
    steps_on(model[1])[0].eta.fill_(0.0)
    assert torch.equal(model[1].weight, net()[1].weight)
    compression.end(model)
    assert torch.equal(model[1].weight, compression.projection.project(net()[1].weight))
    assert len(model[1].weight.unique()) == 2
    assert compression.report(model)["distance_to_grid"]["1"] == pytest.approx(
        float(((net()[1].weight - model[1].weight).norm() / net()[1].weight.norm()).detach())
    )


def test_eta_grows_epoch_by_epoch_until_the_switch() -> None:
    model, compression = attached(gamma=1.5, switch=0.6)
    etas = []
    for step in range(20):
        compression.before(model, Moment(step, 20, 2))
        etas.append(float(steps_on(model[1])[0].eta))
    assert etas[:12] == [1.5 ** (step // 2) for step in range(12)]
    assert etas[12:] == [torch.inf] * 8


def test_what_is_judged_is_on_the_grid_and_training_goes_on_where_it_was() -> None:
    model, compression = attached()
    compression.before(model, Moment(0, 20, 2))
    before = model[1].weight.clone()
    with compression.as_shipped(model):
        assert len(model[1].weight.unique()) == 2
    assert torch.equal(model[1].weight, before)


def test_masked_weights_stay_zero_on_the_grid() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight[:, ::2] = 0.0
    masks = Masks(include=("1",))
    masks.attach(model)
    masks.initialise(model)
    relax = BinaryRelax(include=("1",))
    relax.attach(model)
    relax.end(model)
    assert model[1].weight.unique().tolist() == pytest.approx(
        [-float(model[1].weight.detach().max()), 0.0, float(model[1].weight.detach().max())]
    )
    assert bool((model[1].weight[:, ::2] == 0).all())


def test_a_trained_network_ships_two_values_a_layer_and_still_sees(tmp_path: Path) -> None:
    stage = build(
        "training",
        {
            "name": "fit",
            "objective": "plain",
            "epochs": 10,
            "batch_size": 16,
            "compression": {"name": "binary_relax", "gamma": 2.0},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "holdout": 16,
        },
    )
    folder = RunFolder.create(tmp_path / "run", "recipe")
    model: Any = run_stages([("fit", stage)], net(), SPLITS, folder, seed=1, device=torch.device("cpu")).model
    assert [len(model[number].weight.unique()) for number in (1, 3)] == [2, 2]
    assert isinstance(model[1].weight, nn.Parameter)
    batch = SPLITS.test.batch(torch.arange(40))
    assert float((model(batch.inputs).argmax(1) == batch.labels).float().mean()) > 0.95


def test_an_average_of_quantised_networks_is_refused() -> None:
    spec = {"name": "fit", "objective": "plain", "average": 0.9, "compression": "binary_relax"}
    with pytest.raises(BadValue, match=r"average=0.9 would mix weights of different masks or grids"):
        build("training", spec)
    with pytest.raises(BadValue, match="switch=1 must lie in"):
        BinaryRelax(switch=1)
