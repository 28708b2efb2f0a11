"""Digits, a plain and a PGD-trained network on them, and linear models whose worst case is known in closed form."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trivet.data.digits import digits as load_digits
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend


class Points(NamedTuple):
    x: Tensor
    y: Tensor


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


class Linear(nn.Module):
    """z = W x + b on images [B, 1, h, w], with the distances to its decision boundaries in closed form."""

    def __init__(self, classes: int, side: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, side * side, generator=generator) / side)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def distances(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """[B, K] distance of each point to the boundary with each class, without regard to the box; inf for y."""
        with torch.no_grad():
            logits = self(x)
            gaps = logits.gather(1, y[:, None]) - logits
            dual = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}[norm]
            lengths = torch.linalg.vector_norm(self.weight[y].unsqueeze(1) - self.weight, ord=dual, dim=2)
            return (gaps / lengths.clamp(min=1e-12)).scatter(1, y[:, None], torch.inf)


@pytest.fixture(scope="session")
def linear() -> type[Linear]:
    return Linear


@pytest.fixture(scope="session")
def reference() -> None:
    """The authors' AutoAttack becomes importable as `autoattack`."""
    folder = os.environ.get("TRIVET_AUTOATTACK")
    if not folder or not (Path(folder) / "autoattack").is_dir():
        pytest.skip("set TRIVET_AUTOATTACK to a checkout of fra31/auto-attack to compare with the authors' code")
    sys.path.insert(0, folder)
