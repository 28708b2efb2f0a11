"""Models whose nearest adversarial points are known without a search."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trivet.threats.hyperplane import Norm, to_hyperplane


class Points(NamedTuple):
    x: Tensor
    y: Tensor


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

    def boxed_distances(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        """[B, K] the same with the box: the least change within [0, 1] to the boundary; inf where none reaches it."""
        with torch.no_grad():
            logits, flat = self(x), x.flatten(1)
            away = torch.full_like(logits, torch.inf)
            for other in range(logits.shape[1]):
                normal = self.weight[other] - self.weight[y]
                gap = logits[:, other] - logits.gather(1, y[:, None]).squeeze(1)
                change = to_hyperplane(flat, normal, gap, norm)
                reached = ((normal * change).sum(1) + gap).abs() < 1e-5
                length = torch.linalg.vector_norm(change, ord={"Linf": torch.inf, "L2": 2.0, "L1": 1.0}[norm], dim=1)
                away[:, other] = torch.where(reached & (y != other), length, torch.inf)
            return away
