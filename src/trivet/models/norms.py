"""The choice between kinds of normalisation inside a network, made in one place."""

from __future__ import annotations

from typing import Literal

from torch import nn

Norm = Literal["batch", "group", "none"]
"""`batch` mixes records and is refused under private gradients; `group` and `none` treat each record alone."""


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The layer for maps of `channels`: BatchNorm, GroupNorm of 16 groups (as De et al. 2022), or nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(16, channels)
    return nn.Identity()
