"""alpha-CROWN (Xu et al., ICLR 2021): the slopes below unstable rectifiers, chosen by gradient ascent on the bound.

beta-CROWN (Wang et al., NeurIPS 2021) where some neurons are known to be on one side of 0: a multiplier for each such
constraint is chosen along with the slopes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trivet.certify.bounds.activations import Rectifier
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.propagation import Propagation

STEPS, RATE, DECAY = 20, 0.1, 0.98
"""Of Adam; the rate falls by the factor `DECAY` in each step."""


def chosen(
    use: Propagation, rows: Tensor, node: int, intervals: Sequence[Interval], signs: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Slopes in [0, 1] and multipliers, of each rectifier's node and of each node in `signs`, [B, S, ...].

    They start as CROWN's adaptive slopes and at 0. The best of all iterates is kept for each row; whatever they are,
    the bound they give is true, so that it does not matter in which arithmetic they were found.

    Args:
        use: without error terms.
        rows: [B, S, ...], of `node`.
        intervals: of all nodes before it.
        signs: of nodes, [B, ...] of -1, 0 and 1: the side of 0 on which each value is known to lie, 0 for unknown.
    """
    count = rows.shape[1]
    variables: dict[tuple[str, int], Tensor] = {}
    for at in sorted(use.behind(node)):
        if at and isinstance(use.layers[at - 1], Rectifier):
            before = intervals[use.inputs[at - 1][0]]
            if bool(((before.lower < 0) & (before.upper > 0)).any()):
                variables["slope", at] = _rows((before.upper > -before.lower).to(rows.dtype), count)
        if at in signs and bool(signs[at].any()):
            variables["multiplier", at] = _rows(torch.zeros_like(signs[at], dtype=rows.dtype), count)
    best = rows.new_full(rows.shape[:2], -torch.inf)
    kept = {key: value.clone() for key, value in variables.items()}
    moments = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in variables.items()}
    fixed = [Interval(each.lower.detach(), each.upper.detach()) for each in intervals]
    for step in range(1, STEPS + 2):
        with torch.enable_grad():
            live = {key: value.requires_grad_() for key, value in variables.items()}
            slopes, multipliers = _named(live, signs)
            lines, constant = use.pull(rows.detach(), node, fixed, slopes, multipliers=multipliers)
            bound = use.least(lines, constant, fixed)
            better = bound.detach() > best
            best = torch.where(better, bound.detach(), best)
            kept = {key: torch.where(_like(better, live[key]), live[key].detach(), kept[key]) for key in live}
            if step > STEPS or not live:
                break
            gradients = torch.autograd.grad(bound.sum(), list(live.values()))
        for (key, value), gradient in zip(live.items(), gradients, strict=True):
            variables[key] = _ascended(key[0], value.detach(), gradient, moments[key], step)
    return _named(kept, signs)


def _ascended(kind: str, value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
    """One step of Adam, upwards, back into [0, 1] or [0, infinity)."""
    first, second = moments
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    rate = RATE * DECAY ** (step - 1) / (1 - 0.9**step)
    moved = value + rate * first / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return moved.clamp(0.0, 1.0 if kind == "slope" else None)


def _named(
    variables: Mapping[tuple[str, int], Tensor], signs: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    slopes = {node: value for (kind, node), value in variables.items() if kind == "slope"}
    multipliers = {
        node: value * signs[node].unsqueeze(1).to(value.dtype)
        for (kind, node), value in variables.items()
        if kind == "multiplier"
    }
    return slopes, multipliers


def _rows(values: Tensor, count: int) -> Tensor:
    """[B, ...] to a copy for each row, [B, S, ...]."""
    return values.detach().unsqueeze(1).expand(-1, count, *[-1] * (values.ndim - 1)).clone()


def _like(flags: Tensor, values: Tensor) -> Tensor:
    """[B, S] to a shape that broadcasts with [B, S, ...]."""
    return flags.view(*flags.shape, *[1] * (values.ndim - 2))
