"""Small nets and batches the objectives are tried on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.objectives.objective import Progress


@pytest.fixture
def batch() -> Batch:
    """Eight two-channel images of four classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(8, 2, 4, 4, generator=generator)
    return Batch(inputs, torch.arange(8) % 4, torch.arange(8))


@pytest.fixture
def progress() -> Progress:
    return Progress(step=3, steps=10, epoch=1.5, seed=7)


@pytest.fixture
def mlp() -> nn.Module:
    """Couples no records; smooth, so that first-order promises can be checked."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).train()


@pytest.fixture
def convnet() -> nn.Module:
    """With BatchNorm whose running statistics are away from their start."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    ).train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(16, 2, 4, 4))
    return net


@pytest.fixture
def gradients() -> Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]:
    """The gradients of a mean loss by the parameters, leaving `.grad` empty."""

    def of(model: nn.Module, per_example: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(per_example.mean(), list(model.parameters())))

    return of


@pytest.fixture
def rectified() -> nn.Sequential:
    """ReLU layers alone, in float64, with convolutions of both paddings and two hidden layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 4, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    ).double()


@pytest.fixture
def exact_batch(batch) -> Batch:
    """`batch` in float64."""
    return Batch(batch.inputs.double(), batch.labels, batch.index)
