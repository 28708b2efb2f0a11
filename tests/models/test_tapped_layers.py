"""Taps read what a layer hands on, attached to the pass that made it, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from trivet.errors import BadValue
from trivet.models.taps import tapped


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5), nn.ReLU(), nn.Linear(5, 2))


def test_the_penultimate_representation_makes_the_logits() -> None:
    model, x = net(), torch.rand(4, 1, 5, 5)
    with tapped(model) as features:
        logits = model(x)
        z = features()
    assert z.shape == (4, 5)
    torch.testing.assert_close(model[5](z), logits)
    assert torch.autograd.grad(z.sum(), model[0].weight)[0].abs().sum() > 0


def test_a_named_layer_gives_its_output() -> None:
    model, x = net(), torch.rand(4, 1, 5, 5)
    with tapped(model, "1") as features:
        model(x)
        torch.testing.assert_close(features(), model[0](x).relu())


def test_functional_calls_and_vmap_are_read_too() -> None:
    model, x = net(), torch.rand(4, 1, 5, 5)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}

    def one(record: Tensor) -> Tensor:
        with tapped(model, "3") as features:
            functional_call(model, doubled, record[None])
            return features()[0]

    expected = 2 * (model[3](2 * (model[0](x)).relu().flatten(1)) - model[3].bias) + 2 * model[3].bias
    torch.testing.assert_close(vmap(one)(x), expected)


def test_no_hook_is_left_behind_and_bad_names_are_refused() -> None:
    model = net()
    with pytest.raises(ZeroDivisionError), tapped(model, "0"):
        raise ZeroDivisionError
    assert not model[0]._forward_hooks
    with pytest.raises(BadValue, match="must name a layer of the model: 0, 1, 2"), tapped(model, "9"):
        pass
    with pytest.raises(BadValue, match="no linear layer"), tapped(nn.ReLU()):
        pass
    with tapped(model) as features, pytest.raises(BadValue, match="took no part"):
        features()
