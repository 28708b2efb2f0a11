"""The WNLL output layer as part of a network's structure: where it sits, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from trivet.compression.compression import Compression, WeightMap, steps_on
from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.models.taps import last_linear
from trivet.models.wnll import WnllHead


@method(title="WNLL output layer", paper="Wang et al., NeurIPS 2018", year=2018)
@dataclass(frozen=True, kw_only=True)
class Wnll(Compression):
    """The last linear layer inside a `WnllHead`: how a network with one is built again before its tensors are read.

    The stage `wnll` puts it on and writes this. Nothing becomes smaller by it: like cut channels, it is a change of the
    layers themselves that travels with the weights.

    Attributes:
        templates, neighbours, scale, weighted, together: see `WnllHead`.
    """

    lasting: ClassVar[bool] = True
    templates: int
    neighbours: int = 15
    scale: int = 8
    weighted: bool = True
    together: bool = False

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        raise BadValue("WNLL puts nothing on the weights, and so does not train; use the stage wnll.")

    def begin(self, model: nn.Module) -> None:
        raise BadValue("WNLL is no compression to train with; use the stage wnll.")

    def attach(self, model: nn.Module) -> None:
        """Put the head in the place of the last linear layer of `model`, which it holds.

        Raises:
            BadValue: no such layer, one that is the whole model, or one whose weight is compressed.
        """
        linear = last_linear(model)
        name = next(name for name, module in model.named_modules() if module is linear)
        require(bool(name), "the model is its last linear layer, and has no features to interpolate on.")
        require(
            not steps_on(linear),
            f"the weight of {name} is compressed, and its name would change under the head; add {name!r} to exclude.",
        )
        parent, _, attribute = name.rpartition(".")
        head = WnllHead(linear, self.templates, self.neighbours, self.scale, self.weighted, self.together)
        setattr(model.get_submodule(parent), attribute, head)
