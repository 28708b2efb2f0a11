"""BatchNorm held at a batch: the same network for every pass of a step, and no trace of it afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trivet.models.batch_statistics import held_at, training_norms


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)
    ).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 2, 4, 4, dtype=torch.float64)


def test_inside_the_batch_itself_has_the_logits_of_the_pass_and_others_do_not_move_it(net, x) -> None:
    expected = copy.deepcopy(net)(x)
    with held_at(net, x) as logits:
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(net(torch.cat([x[:2], 9 + x[2:]]))[:2], expected[:2])


@pytest.mark.parametrize("update", [True, False])
def test_running_statistics_move_once_or_not_at_all_and_modes_return(net, x, update) -> None:
    net[5].eval()
    once = copy.deepcopy(net)
    if update:
        once(x)
    with held_at(net, x, update=update):
        net(1 - x)
        assert not any(module.training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), once.state_dict().values(), strict=True))
    assert [m.training for m in net.modules()] == [m.training for m in once.modules()]


def test_gradients_flow_through_the_statistics(net, x) -> None:
    """The loss inside is the same function of the weights as that of an ordinary pass."""
    twin = copy.deepcopy(net)
    with held_at(net, x):
        net(x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_layers_stay_as_they_are(net, x) -> None:
    net.eval()
    assert training_norms(net) == []
    expected = net(1 - x)
    with held_at(net, x):
        assert torch.equal(net(1 - x), expected)


def test_an_error_inside_leaves_the_model_whole(net, x) -> None:
    with pytest.raises(ZeroDivisionError), held_at(net, x, update=False):
        raise ZeroDivisionError
    assert net[1].training
    assert not net[1].running_mean.any()
