"""Digits, a plain and a PGD-trained network on them, and the authors' AutoAttack where it is at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from closed_forms import Points
from torch import nn

from trivet.data.digits import digits as load_digits
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend


@pytest.fixture(scope="session")
def train_points() -> Points:
    batch = next(load_digits().train.batches(2000))
    return Points(batch.inputs, batch.labels)


@pytest.fixture(scope="session")
def test_points() -> Points:
    batch = next(load_digits().test.batches(2000))
    return Points(batch.inputs, batch.labels)


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def _trained(net: nn.Module, points: Points, eps: float, epochs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    threat = Linf(eps)
    for _ in range(epochs):
        for index in torch.randperm(len(points.x), generator=generator).split(64):
            x, y = points.x[index], points.y[index]
            net.eval()
            if eps:
                start = threat.random_start(x, generator)
                x = ascend(net, x, start, lambda z, y=y: cross_entropy(z, y), threat=threat, steps=5, step_size=eps / 2)
            net.train()
            optimizer.zero_grad()
            cross_entropy(net(x), y).mean().backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="session")
def plain_net(train_points: Points) -> nn.Module:
    """A small convolutional net with BatchNorm, without defence."""
    torch.manual_seed(0)
    return _trained(_convnet(), train_points, eps=0.0, epochs=6)


@pytest.fixture(scope="session")
def robust_net(train_points: Points) -> nn.Module:
    """A multilayer perceptron after PGD adversarial training at l_inf 0.1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    return _trained(net, train_points, eps=0.1, epochs=10)


@pytest.fixture(scope="session")
def reference() -> None:
    """The authors' AutoAttack becomes importable as `autoattack`."""
    folder = os.environ.get("TRIVET_AUTOATTACK")
    if not folder or not (Path(folder) / "autoattack").is_dir():
        pytest.skip("set TRIVET_AUTOATTACK to a checkout of fra31/auto-attack to compare with the authors' code")
    sys.path.insert(0, folder)
