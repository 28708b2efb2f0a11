"""The least change of an input in [0, 1]^D that brings it onto a hyperplane: the inner problem of FAB."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["Linf", "L2", "L1"]


def to_hyperplane(x: Tensor, w: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """argmin ||d||_p subject to w . d = -gap and 0 <= x + d <= 1, for p = inf, 2 or 1 (Croce & Hein, ICML 2020).

    Where the box does not reach the hyperplane, d goes as near to it as the box allows.

    Args:
        x: [B, D] in [0, 1]; `w`: [B, D] normals; `gap`: [B], the value at `x` of the function that is to vanish.
    """
    toward = w.sign() * -gap.sign()[:, None]
    room = 0.5 + toward * (0.5 - x)  # 1 - x_i upwards, x_i downwards
    slope = w.abs()
    if norm == "L1":
        change = _greedy(slope, room, gap.abs())
    elif norm == "L2":
        change = torch.minimum(slope * _pace(slope * slope, slope * room, room / slope, gap.abs()), room)
    else:
        change = torch.minimum(_pace(slope, slope * room, room, gap.abs()), room)
    return toward * change


def _pace(rate: Tensor, gain: Tensor, until: Tensor, goal: Tensor) -> Tensor:
    """The least t [B, 1] with sum_i min(t rate_i, gain_i) = goal; each term stops growing at t = until_i.

    The sum is concave and piecewise linear in t, so Newton's method climbs to the solution from t = 0 without ever
    passing it, and has it exactly once it is on the right piece: after a few passes, where sorting the D kinks would
    take log D. Where the goal is out of reach, t is 1e30.
    """
    t = goal / rate.sum(1)
    rows = torch.arange(len(goal), device=goal.device)
    for _ in range(64):
        growing = (until > t[rows, None]).to(rate.dtype)
        stopped = (gain * (1 - growing)).sum(1)
        ahead = (goal - stopped) / (rate * growing).sum(1)
        moves = ahead > t[rows] * (1 + 1e-6)
        t[rows] = torch.where(moves, ahead, t[rows])
        moves = moves.nonzero().squeeze(1)
        if not len(moves):
            break
        if 2 * len(moves) < len(rows):
            rate, gain, until, goal, rows = (each[moves] for each in (rate, gain, until, goal, rows))
    return t.nan_to_num(nan=0.0, posinf=1e30)[:, None]


def _greedy(slope: Tensor, room: Tensor, goal: Tensor) -> Tensor:
    """Pixels go to the box in the order of their slope until the goal is met; the last one goes part of the way."""
    order = slope.argsort(1, descending=True)
    steep, space = slope.gather(1, order), room.gather(1, order)
    gain = steep * space
    before = gain.cumsum(1) - gain
    part = ((goal[:, None] - before) / steep.clamp(min=1e-30)).clamp(min=0)
    return torch.zeros_like(room).scatter_(1, order, torch.minimum(part, space))
