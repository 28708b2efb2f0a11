"""The oracle of the engines, a plain loop over single records, and small models to try them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.privacy.book_keeping import BookKeeping
from trivet.privacy.engine import Engine
from trivet.privacy.materialised import Materialised

PROGRESS = Progress(step=0, steps=1, epoch=0.0, seed=0)
ENGINES: dict[str, Callable[[], Engine]] = {
    "book_keeping": BookKeeping,
    "book_keeping in parts": lambda: BookKeeping(records=2),
    "materialised": Materialised,
    "materialised in parts": lambda: Materialised(most=2),
}
RECORDS = 5


def clip(norms: Tensor) -> Tensor:
    """A bound that some records of these tests exceed and some do not."""
    return 0.5 / norms.clamp_min(0.5)


def plain(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
    """The objective of most tests: smooth, and different for each label."""
    outputs = model(perturbed).flatten(1)
    weights = torch.linspace(-1, 1, outputs.shape[1], dtype=outputs.dtype) * (1 + batch.labels[:, None])
    return Losses((weights * outputs.tanh()).sum(1))


def of(objective: Objective) -> Callable[[nn.Module, Batch, Tensor], Losses]:
    return lambda model, batch, perturbed: objective.losses(model, batch, perturbed, PROGRESS)


def batch_of(inputs: Tensor, classes: int = 3) -> Batch:
    return Batch(inputs, torch.arange(len(inputs)) % classes, torch.arange(len(inputs)))


def one_by_one(model: nn.Module, batch: Batch, perturbed: Tensor, losses: Any) -> tuple[list[Tensor], Tensor]:
    """Per-record gradients, computed for each record alone by plain autograd, clipped and added."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    norms = []
    for i in range(len(batch)):
        one = slice(i, i + 1)
        loss = losses(model, batch.select(one), perturbed[one]).per_example.sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        norm = torch.cat([g.flatten() for g in filled]).norm()
        norms.append(norm)
        if norm.isfinite():
            total = [t + clip(norm[None])[0] * g for t, g in zip(total, filled, strict=True)]
    return total, torch.stack(norms)


def assert_exact(engine: Engine, model: nn.Module, inputs: Tensor, losses: Any = plain, **tolerance: float) -> None:
    """The engine's norms and sums are those of the loop."""
    batch = batch_of(inputs[:, 0] if inputs.dim() == 6 else inputs)
    total, norms = one_by_one(model, batch, inputs, losses)
    found = engine.clipped_sum(model, batch, inputs, losses, clip)
    limits = tolerance or {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found.norms, norms, **limits)
    assert len(found.total) == len(total)
    for mine, expected in zip(found.total, total, strict=True):
        torch.testing.assert_close(mine, expected, **limits)
    assert float(norms.max()) > 0


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with weights away from ones and zeros."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(channels: int, *size: int) -> Tensor:
    return torch.randn(RECORDS, channels, *size, dtype=torch.float64)


class Embedded(nn.Module):
    """Word indices from images in [0, 1], embedded."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.abs() * 3).long().clamp(max=5)).tanh()


def network(norm: bool = True) -> nn.Module:
    """With every kind of layer, in-place activations and a layer that is used twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(6, 6, 3, padding=1)
            self.norm = nn.GroupNorm(3, 6) if norm else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.shared(x))
            return F.relu_(self.shared(F.elu(y))) + x

    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2),
            nn.ReLU(inplace=True),
            Twice(),
            nn.Flatten(),
            nn.Linear(54, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )
    )


def pixels() -> Tensor:
    return torch.rand(RECORDS, 2, 8, 8, dtype=torch.float64)
