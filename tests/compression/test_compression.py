"""Maps on weights: attached, saved, attached again, taken off; and what everything else sees of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trivet.certify.bounds.network import Ball, Network, margin_rows
from trivet.compression.compression import steps_on
from trivet.compression.masks import Masks
from trivet.compression.structure import finish, restructure
from trivet.errors import BadValue, TrivetError
from trivet.methods import spec_of
from trivet.models.pixeldp import pixeldp_cnn
from trivet.models.surrogate import Surrogate


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 6), nn.ReLU(), nn.Linear(6, 3))


def masked(seed: int = 0) -> nn.Sequential:
    model = net(seed)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight *= torch.rand_like(layer.weight) < 0.4
    compression = Masks(exclude=("5",))
    compression.attach(model)
    compression.initialise(model)
    return model


def test_layers_are_chosen_by_name() -> None:
    assert list(Masks().layers(net())) == ["0", "3", "5"]
    assert list(Masks(include=("3", "5"), exclude=("5",)).layers(net())) == ["3"]
    with pytest.raises(BadValue, match="leave no convolution or linear layer"):
        Masks(include=("7",)).layers(net())


def test_dropped_weights_stay_zero_whatever_the_optimizer_does() -> None:
    model = masked()
    dropped = {name: each.weight == 0 for name, each in Masks(exclude=("5",)).layers(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8) % 3).backward()
        optimizer.step()
    for name, where in dropped.items():
        weight = dict(model.named_modules())[name].weight
        assert bool((weight[where] == 0).all())
        assert bool((weight[~where] != 0).all())


def test_a_structure_attaches_to_a_fresh_network_what_was_saved() -> None:
    model, fresh = masked(), net(1)
    structure = [spec_of(Masks(include=("0", "3")))]
    restructure(fresh, structure, "here")
    fresh.load_state_dict(model.state_dict())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(TrivetError, match="here was compressed in a way this Trivet does not know: there is no 'new'"):
        restructure(net(), [{"name": "new"}], "here")


def test_finishing_leaves_plain_weights_of_the_same_value_and_no_other_network_is_touched() -> None:
    model = masked()
    x = torch.rand(4, 1, 8, 8)
    expected, before = model(x), copy.deepcopy(model)
    assert finish(model, [spec_of(Masks(include=("0", "3")))]) == []
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert all(isinstance(each, nn.Parameter) for each in (model[0].weight, model[3].weight))
    assert torch.equal(before(x), expected)
    assert [len(steps_on(each)) for each in (before[0], before[3], before[5])] == [1, 1, 0]


def test_attacks_and_bounds_see_the_compressed_weights() -> None:
    model, plain = masked(), net()
    with torch.no_grad():
        for mine, theirs in zip(plain, model, strict=True):
            if hasattr(mine, "weight"):
                mine.weight.copy_(theirs.weight)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    torch.testing.assert_close(Surrogate(model, "fp32")(x), plain(x))
    ball = Ball(x, torch.full((4,), 0.01), "Linf")
    bounds = [
        Network.of(each.eval(), (1, 8, 8)).margins(ball, margin_rows(y, 3), method="crown", arithmetic="float32")
        for each in (model, plain)
    ]
    torch.testing.assert_close(*bounds)


def test_a_weight_that_something_else_computes_is_not_compressed_over() -> None:
    model = pixeldp_cnn((1, 28, 28), 10)
    with pytest.raises(BadValue, match="is computed by UnitSensitivity, which a compression would change; add"):
        Masks().attach(model)
