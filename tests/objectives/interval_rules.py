"""Interval arithmetic written out for tests: positive and negative weights apart, no centre, no radius, no engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.data.dataset import Batch


def by_hand(net: nn.Sequential, lower: Tensor, upper: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The ends of every value of a sequence of layers, the input's first."""
    found = [(lower, upper)]
    for module in net:
        if isinstance(module, nn.Linear):
            plus, minus = module.weight.clamp(min=0), module.weight.clamp(max=0)
            lower, upper = (lower @ plus.T + upper @ minus.T, upper @ plus.T + lower @ minus.T)
            lower, upper = lower + module.bias, upper + module.bias
        elif isinstance(module, nn.Conv2d):
            plus, minus = module.weight.clamp(min=0), module.weight.clamp(max=0)

            def convolved(x: Tensor, weight: Tensor, module: nn.Conv2d = module) -> Tensor:
                return F.conv2d(x, weight, None, module.stride, module.padding)

            bias = module.bias.view(-1, 1, 1)
            lower, upper = (
                convolved(lower, plus) + convolved(upper, minus) + bias,
                convolved(upper, plus) + convolved(lower, minus) + bias,
            )
        else:
            lower, upper = module(lower), module(upper)
        found.append((lower, upper))
    return found


def merged_margins(net: nn.Sequential, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """Lower bounds [B, K - 1] of z_y - z_j, the difference taken of the last layer's weights, before bounding."""
    lower, upper = by_hand(net[:-1], lower, upper)[-1]
    last = net[-1]
    rows = []
    for one in range(len(labels)):
        y = int(labels[one])
        others = [j for j in range(len(last.bias)) if j != y]
        weight = last.weight[y] - last.weight[others]
        bias = last.bias[y] - last.bias[others]
        rows.append(weight.clamp(min=0) @ lower[one] + weight.clamp(max=0) @ upper[one] + bias)
    return torch.stack(rows)


def ball(batch: Batch, eps: float) -> tuple[Tensor, Tensor]:
    """The ends of the l_inf ball within [0, 1]."""
    return (batch.inputs - eps).clamp(min=0), (batch.inputs + eps).clamp(max=1)


def worst_loss(margins: Tensor) -> Tensor:
    """log(1 + sum_j exp(-m_j))."""
    return torch.cat([torch.zeros(len(margins), 1, dtype=margins.dtype), -margins], 1).logsumexp(1)
