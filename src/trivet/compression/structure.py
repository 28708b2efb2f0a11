"""What was put on the weights of a network, in words: to attach it again to a fresh one, and to take it off for good.

A structure is a list of specs, each of a compression, in the order they were attached. It travels with the weights,
which without it would not fit into the network the recipe describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trivet.compression.compression import Compression, WeightMap, steps_on
from trivet.errors import FieldError, TrivetError
from trivet.methods import build, find
from trivet.models.baking import Chain, bake

Structure = list[dict[str, Any]]


def restructure(model: nn.Module, structure: Sequence[Mapping[str, Any]], where: str) -> None:
    """Attach to a freshly made `model` what `structure` lists, in place; `where` is named in errors."""
    for spec in structure:
        try:
            build("compression", spec, expects=Compression).attach(model)
        except FieldError as error:
            raise TrivetError(f"{where} was compressed in a way this Trivet does not know: {error.text}") from None


def finish(model: nn.Module, structure: Structure) -> Structure:
    """Turn compressed weights into plain ones of the same value, in place; what is left is returned.

    Weights stored as factors stay factors: they are what ships. Layers that were cut stay cut.
    """
    bake(model, _plain)
    left = {
        name for name, layer in model.named_modules() if any(isinstance(each, WeightMap) for each in steps_on(layer))
    }
    return [
        spec if _lasts(spec) else {**spec, "include": [layer for layer in spec["include"] if layer in left]}
        for spec in structure
        if _lasts(spec) or left.intersection(spec["include"])
    ]


def _lasts(spec: Mapping[str, Any]) -> bool:
    return "name" in spec and bool(getattr(find("compression", spec["name"]).make, "lasting", False))


def _plain(chain: Chain) -> bool:
    steps = list(chain)
    ours = any(isinstance(step, WeightMap) for step in steps)
    return ours and not any(isinstance(step, WeightMap) and step.factors for step in steps)
