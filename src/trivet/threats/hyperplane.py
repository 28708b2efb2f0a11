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
    toward = -gap.sign()[:, None] * w.sign()
    room = torch.where(toward > 0, 1 - x, x)
    slope = w.abs()
    if norm == "L1":
        return toward * _greedy(slope, room, gap.abs())
    pace = torch.ones_like(slope) if norm == "Linf" else slope
    return toward * _together(slope, room, pace, gap.abs())


def _together(slope: Tensor, room: Tensor, pace: Tensor, goal: Tensor) -> Tensor:
    """|d_i| = min(t pace_i, room_i), with t [B] such that sum_i slope_i |d_i| = goal.

    The sum is concave and piecewise linear in t, so Newton's method climbs to the solution from t = 0 without ever
    passing it, and is there after as many steps as there are pieces on the way: a handful, where sorting the D kinks
    would cost log D passes over everything.
    """
    rate = slope * pace
    t = goal / rate.sum(1).clamp(min=1e-30)
    for _ in range(64):
        change = torch.minimum(t[:, None] * pace, room)
        missing = goal - torch.linalg.vecdot(slope, change)
        # No slope left means that every pixel is at the box: the corner is as near as it gets.
        remaining = torch.linalg.vecdot(rate, (t[:, None] * pace < room).to(rate.dtype))
        open_ = (missing > 1e-6 * goal) & (remaining > 0)
        if not bool(open_.any()):
            break
        t = torch.where(open_, t + missing / remaining, t)
    return torch.minimum(t[:, None] * pace, room)


def _greedy(slope: Tensor, room: Tensor, goal: Tensor) -> Tensor:
    """Pixels go to the box in the order of their slope until the goal is met; the last one goes part of the way."""
    order = slope.argsort(1, descending=True)
    steep, space = slope.gather(1, order), room.gather(1, order)
    gain = steep * space
    before = gain.cumsum(1) - gain
    part = ((goal[:, None] - before) / steep.clamp(min=1e-30)).clamp(min=0)
    return torch.zeros_like(room).scatter_(1, order, torch.minimum(part, space))
