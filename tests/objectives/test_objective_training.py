"""What the objectives are for: a small net trained on the digits resists an attack that breaks the plain one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from trivet.data.dataset import Dataset
from trivet.methods import build
from trivet.objectives.objective import Progress
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

EPS, EPOCHS, SIGMA = 0.1, 15, 0.5


@cache
def digits() -> tuple[Dataset, Dataset]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    whole = Dataset(images, torch.from_numpy(found.target).long(), tuple("0123456789"), "digits", scale=1.0)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    return whole.select(order[:1297]), whole.select(order[1297:])


@cache
def trained(name: str) -> nn.Module:
    spec = {
        "awp": {"name": "awp", "objective": {"name": "pgd_at", "steps": 5}},
        "gaussian": {"name": "gaussian", "sigma": SIGMA},
        "free_at": {"name": "free_at", "replays": 4},
    }.get(name, {"name": name} | ({"steps": 5} if name in ("pgd_at", "trades", "mart", "alp") else {}))
    objective = build("objectives", spec, threat=Linf(EPS))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, train = torch.optim.Adam(net.parameters(), 0.005), digits()[0]
    step, steps = 0, EPOCHS * 21
    while step < steps:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(step))
        for index in order.split(64):
            for _ in range(objective.replays):
                optimizer.zero_grad()
                progress = Progress(step, steps, step / 21, seed=0)
                objective(net, train.batch(index), progress).per_example.mean().backward()
                optimizer.step()
                step += 1
    return net.eval()


@cache
def accuracy(name: str) -> tuple[float, float, float]:
    """On test digits: clean, under the worse of PGD-20 on cross-entropy and on the margin, and under noise."""
    net, test = trained(name), digits()[1]
    batch = test.batch(torch.arange(len(test)))
    threat, standing = Linf(EPS), torch.ones(len(test), dtype=torch.bool)
    for loss in ("ce", "margin"):
        attack = PGD(threat, steps=20, loss=loss)
        standing &= ~attack.run(net, batch.inputs, batch.labels, generator=torch.Generator().manual_seed(1)).broken
    noise = SIGMA * torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        clean, noisy = (
            float((net(x).argmax(1) == batch.labels).float().mean()) for x in (batch.inputs, batch.inputs + noise)
        )
    return clean, float(standing.float().mean()), noisy


@pytest.mark.parametrize("name", ["pgd_at", "trades", "mart", "alp", "awp", "fast_at", "free_at"])
def test_adversarial_training_resists_an_attack_that_breaks_plain_training(name) -> None:
    plain_clean, plain_robust, _ = accuracy("plain")
    clean, robust, _ = accuracy(name)
    assert plain_clean > 0.9
    assert clean > 0.9
    assert robust > plain_robust + 0.15


def test_training_under_noise_resists_noise() -> None:
    assert accuracy("gaussian")[2] > accuracy("plain")[2] + 0.1
