"""How a density is spread over layers: the same in each, by scores compared across them, or by their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Literal

import torch
from torch import Tensor

from trivet.compression.pattern import Pattern, UnitPattern
from trivet.errors import BadValue, require

Scope = Literal["layerwise", "global", "erk"]


def chosen(scores: Mapping[str, Tensor], pattern: Pattern, density: float, scope: Scope) -> dict[str, Tensor]:
    """Masks of the layers named in `scores`, which keep the share `density` of all weights together.

    "layerwise": the share of each layer, so that small layers lose as much as large ones.
    "global": the units of all layers compete by the mean score of their weights. The smallest are dropped, as many as
        fit into what is to be dropped; of equal ones the first.
    "erk": the share of each layer follows its shape (`erk`), and the best of each are kept.
    """
    require(0 < density <= 1, f"density={density} must lie in (0, 1].")
    if scope == "global":
        return _global(scores, pattern, density)
    shares = dict.fromkeys(scores, density)
    if scope == "erk":
        shares = erk({name: each.shape for name, each in scores.items()}, density)
    return {name: pattern.keep(each, shares[name]) for name, each in scores.items()}


def _global(scores: Mapping[str, Tensor], pattern: Pattern, density: float) -> dict[str, Tensor]:
    if not isinstance(pattern, UnitPattern):
        raise BadValue(
            f"scope='global' compares units of different layers, and {type(pattern).__name__} has none; choose "
            "layerwise or erk."
        )
    sizes = [pattern.units(torch.ones_like(each, dtype=torch.float64)) for each in scores.values()]
    # In float64, where the sum of many equal scores gives their mean again.
    means = [pattern.units(each.double()) / size for each, size in zip(scores.values(), sizes, strict=True)]
    order = torch.cat(means).argsort(stable=True)
    weights = torch.cat(sizes)[order].cumsum(0)
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    keep[order[weights <= floor((1 - density) * float(weights[-1]) + 1e-9)]] = False
    parts = keep.split([len(each) for each in means])
    return {name: pattern.spread(part, each.shape) for (name, each), part in zip(scores.items(), parts, strict=True)}


def erk(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """The Erdos-Renyi-kernel densities of layers (Evci et al., ICML 2020).

    They are proportional to sum(shape) / prod(shape), but at most 1, and give `density` over all weights together:
    layers with few weights keep a larger share of them.
    """
    counts = {name: shape.numel() for name, shape in shapes.items()}
    raw = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
    full: set[str] = set()
    while len(full) < len(shapes):
        wanted = density * sum(counts.values()) - sum(counts[name] for name in full)
        scale = wanted / sum(raw[name] * counts[name] for name in shapes if name not in full)
        over = {name for name in shapes if name not in full and scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in shapes}
        full |= over
    return dict.fromkeys(shapes, 1.0)
