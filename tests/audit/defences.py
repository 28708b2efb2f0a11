"""A small network, defences to put around it, and a quick audit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.audit.audit import Audit
from trivet.data.dataset import Dataset
from trivet.models.mlp import mlp
from trivet.randomness import generator
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

THREAT = Linf(0.1)
QUICK = Audit(THREAT, attacks=(PGD(THREAT, 10),), points=200, curve_points=200, latency=(), examples=4)


class Defence(nn.Module):
    """`model`, with something in front of it and behind it."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


def same(x: Tensor) -> Tensor:
    return x


def trained(data: Dataset, epochs: int = 20) -> nn.Module:
    model = mlp((1, 8, 8), 10, hidden=(64, 64), generator=generator(0, "init"))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    everything = data.batch(torch.arange(len(data)))
    for epoch in range(epochs):
        for index in torch.randperm(len(data), generator=generator(0, "order", epoch)).split(64):
            loss = F.cross_entropy(model(everything.inputs[index]), everything.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()
