"""Fast adversarial training: its single step, and the two modes the step may be taken in."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivet.objectives.fast_at import FastAt
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf

EPS = 0.1


def test_on_a_linear_model_the_step_is_known_in_closed_form(batch, progress) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 2))
    batch = type(batch)(batch.inputs, batch.labels % 2, batch.index)
    objective = FastAt(Linf(EPS))
    start = objective.start(objective.threat, batch, progress)
    away = net[1].weight[1 - batch.labels] - net[1].weight[batch.labels]
    expected = start + 1.25 * EPS * away.view_as(start).sign()
    expected = torch.min(torch.max(expected, batch.inputs - EPS), batch.inputs + EPS).clamp(0, 1)
    assert torch.allclose(objective.perturb(net, batch, progress), expected, atol=1e-6)
    # The start is inside the ball, so a step of 1.25 eps does not reach the far face from everywhere.
    assert not torch.allclose((expected - batch.inputs).abs().clamp(max=EPS), torch.tensor(EPS), atol=1e-3)


def test_in_train_mode_it_is_the_authors_loop(convnet, batch, progress) -> None:
    objective, reference = FastAt(Linf(EPS), attack_mode="train"), copy.deepcopy(convnet)
    x = batch.inputs
    delta = (objective.start(objective.threat, batch, progress) - x).requires_grad_()
    F.cross_entropy(reference(x + delta), batch.labels).backward()
    delta = (delta.detach() + 1.25 * EPS * delta.grad.sign()).clamp(-EPS, EPS)
    expected = x + torch.max(torch.min(delta, 1 - x), -x)

    assert torch.allclose(objective.perturb(convnet, batch, progress), expected, atol=1e-6)
    for ours, theirs in zip(convnet.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert all(parameter.grad is None for parameter in convnet.parameters())


def test_in_eval_mode_the_attack_moves_no_running_statistics(convnet, batch, progress) -> None:
    before = copy.deepcopy(convnet)
    FastAt(Linf(EPS)).perturb(convnet, batch, progress)
    for ours, theirs in zip(convnet.buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert convnet.training


def test_a_dropout_net_sees_the_mode_it_was_asked_for(batch, progress) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 4)).train()
    modes = []
    net[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    FastAt(Linf(EPS), attack_mode="train").perturb(net, batch, progress)
    assert modes == [True]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_at_radius_zero_it_is_plain_training(mlp, batch, progress, mode) -> None:
    ours = FastAt(Linf(0.0), attack_mode=mode)(mlp, batch, progress).per_example
    assert torch.equal(ours, Plain()(mlp, batch, progress).per_example)
