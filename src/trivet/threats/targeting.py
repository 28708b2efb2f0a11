"""Targeted attacks try several wrong classes for each point; here the tries share their batches.

One after the other, each class would be a run of its own with ever fewer points in the batch. Fused, the runner-up
classes of all points come first, batches are always full, and a point that falls takes its other tries with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trivet.threats.attack import Target


class Tries(NamedTuple):
    """What came of some tries.

    Attributes:
        points: [B, ...] the best point of each try.
        won: [B] bool, the point is a verified success.
        score: [B] how near the others came; the greatest is kept.
    """

    points: Tensor
    won: Tensor
    score: Tensor


class Climb(Protocol):
    """A search from inputs `x` [B, ...] labelled `y` [B] towards the classes `aim` [B].

    Tries with the same `owner` [B] belong to one point: when one wins, the others may stop.
    """

    def __call__(self, x: Tensor, y: Tensor, aim: Tensor, owner: Tensor) -> Tries: ...


@torch.no_grad()
def ranked_classes(model: Target, x: Tensor, y: Tensor, count: int) -> Tensor:
    """[B, min(count, K - 1)]: the wrong classes of each point, the most likely first."""
    logits = model(x)
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.argsort(1, descending=True)[:, : min(count, logits.shape[1] - 1)]


def try_classes(model: Target, x: Tensor, y: Tensor, count: int, climb: Climb) -> Tensor:
    """The best point [B, ...] that `climb` finds for each input among the `count` most likely wrong classes."""
    return try_aims(model, x, y, ranked_classes(model, x, y, count), climb)


def try_aims(model: Target, x: Tensor, y: Tensor, aims: Tensor, climb: Climb) -> Tensor:
    """The best point [B, ...] that `climb` finds for each input among its classes `aims` [B, T], the first first."""
    best, score = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    queue = torch.arange(aims.numel(), device=x.device)  # rank by rank, each rank a pass over all points
    while len(queue):
        owner = queue[: model.batch_size] % len(x)
        aim = aims[owner, queue[: model.batch_size] // len(x)]
        tries = climb(x[owner], y[owner], aim, owner)
        value = tries.score.masked_fill(tries.won, torch.inf)
        chosen = best_of_each(value, owner, score)
        best[owner[chosen]], score[owner[chosen]] = tries.points[chosen], value[chosen]
        queue = queue[model.batch_size :]
        queue = queue[score[queue % len(x)] < torch.inf]
    return best


def try_again(x: Tensor, y: Tensor, climbs: Sequence[Climb]) -> Tensor:
    """The best point [B, ...] of untargeted restarts `climbs`, each attacking only what still stands."""
    best, score = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for climb in climbs:
        open_ = (score < torch.inf).nonzero().squeeze(1)
        if not len(open_):
            break
        tries = climb(x[open_], y[open_], y[open_], torch.arange(len(open_), device=x.device))
        value = tries.score.masked_fill(tries.won, torch.inf)
        better = value > score[open_]
        best[open_[better]], score[open_[better]] = tries.points[better], value[better]
    return best


def best_of_each(value: Tensor, owner: Tensor, least: Tensor) -> Tensor:
    """Indices of the rows with the greatest `value` [B] of their `owner` [B], one for each owner it raises.

    `least` [N] is what an owner already has.
    """
    top = least.scatter_reduce(0, owner, value, "amax")
    row = torch.arange(len(value), device=value.device)
    winner = (value == top[owner]) & (value > least[owner])
    first = torch.full_like(least, len(value), dtype=torch.long).scatter_reduce(0, owner[winner], row[winner], "amin")
    return first[first < len(value)]
