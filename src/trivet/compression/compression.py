"""What every compression is: maps put on the weights of chosen layers, which stay there while the network trains.

A layer computes with w = map(stored tensors). The maps are parametrizations of PyTorch, and everything that asks a
layer for its weight, be it an attack, a bound, a per-record gradient or an audit, gets the compressed one. What a
method remembers between steps (masks, scores, duals) are tensors of its maps, so that a killed run resumes exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.errors import require

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose weights can be compressed, by their classes before anything was put on them."""


class WeightMap(nn.Module):
    """From the tensors that are stored to the weight a layer computes with: `forward(*stored) -> weight`.

    Attributes:
        factors: whether the stored tensors are what ships. If not, a finished network holds the plain weight.
        randomised: whether the weight is another one in every pass.
    """

    factors: ClassVar[bool] = False
    randomised: bool = False


@dataclass(frozen=True)
class Moment:
    """When, in a stage of training, a compression is asked to act. `step` counts from 0, up to `steps`."""

    step: int
    steps: int
    per_epoch: int

    @property
    def epoch(self) -> int:
        """The epochs that are over."""
        return self.step // self.per_epoch

    @property
    def fraction(self) -> float:
        """The share of training that is over, in [0, 1)."""
        return self.step / self.steps

    @property
    def starts_epoch(self) -> bool:
        return self.step % self.per_epoch == 0


@dataclass(frozen=True, kw_only=True)
class Compression(ABC):
    """Makes the weights of chosen layers small, once and for all or step by step as a stage trains the network.

    A stage calls `attach`, `begin` and, unless it resumes, `initialise`; then at every step `before`, the gradients,
    `adjust`, the optimizer, `after`; and in the end `end`. None of these sees a record: where scores or factors
    are learnt, they are parameters, trained by the stage's gradient rule, and so within its privacy.

    Attributes:
        include, exclude: shell patterns over the names of convolutions and linear layers; a layer is compressed that
            matches one of `include` and none of `exclude`.
        lasting: whether it changes the layers themselves, and so outlives its maps.
    """

    room: ClassVar[str] = "compression"
    lasting: ClassVar[bool] = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to compress, by name, in the model's order.

        Raises:
            BadValue: there is none.
        """
        chosen = {
            name: module
            for name, module in model.named_modules()
            if issubclass(parametrize.type_before_parametrizations(module), WEIGHTED)
            and any(fnmatchcase(name, pattern) for pattern in self.include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }
        require(
            bool(chosen),
            f"include={list(self.include)} and exclude={list(self.exclude)} leave no convolution or linear layer.",
        )
        return chosen

    @abstractmethod
    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        """The map to put on the weight of a layer, with tensors of the right shapes; what is in them comes later."""

    def attach(self, model: nn.Module) -> None:
        """Put the maps on. Afterwards the network is one that this compression has ended on, but for the values.

        Raises:
            BadValue: a weight that is already computed by something other than a compression.
        """
        for name, layer in self.layers(model).items():
            for step in steps_on(layer):
                require(
                    isinstance(step, WeightMap),
                    f"the weight of {name} is computed by {type(step).__name__}, which a compression would change; "
                    f"add {name!r} to exclude.",
                )
            weight_map = self.map_for(name, layer).to(layer.weight.device)  # type: ignore[arg-type]
            parametrize.register_parametrization(layer, "weight", weight_map)

    def maps(self, model: nn.Module) -> dict[str, Any]:
        """The maps of this compression on `model`, by layer: on each, the one put on last."""
        return {name: steps_on(layer)[-1] for name, layer in self.layers(model).items()}

    def begin(self, model: nn.Module) -> None:
        """Prepare to train: say which tensors learn. Called also where a killed stage goes on."""

    def initialise(self, model: nn.Module) -> None:
        """Fill the maps, from the weights as they are at the start of the stage."""

    def before(self, model: nn.Module, moment: Moment) -> None:
        """Act before the gradients of a step."""

    def adjust(self, model: nn.Module, moment: Moment) -> None:
        """Act on the gradients, before the optimizer uses them: add those of penalties, which see weights alone."""

    def after(self, model: nn.Module, moment: Moment) -> None:
        """Act after the optimizer's step number `moment.step`."""

    def as_shipped(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the network computes as it would if training ended now: what held-out records judge."""
        return nullcontext()

    def report(self, model: nn.Module) -> dict[str, Any]:
        """What the record of the stage says about it; asked just before `end`."""
        return {}

    def end(self, model: nn.Module) -> Compression:
        """Leave behind what later stages train with; what is returned attaches the same to a fresh network."""
        return self


def steps_on(layer: nn.Module, name: str = "weight") -> list[nn.Module]:
    """The maps on a tensor of a layer, in the order they are applied; empty where it is plain."""
    if not parametrize.is_parametrized(layer, name):
        return []
    chains: Any = layer.parametrizations
    return list(chains[name])


def originals(layer: nn.Module, name: str = "weight") -> list[Tensor]:
    """The tensors that are stored for a tensor of a layer: itself where it is plain, none where there is none."""
    if not parametrize.is_parametrized(layer, name):
        plain = getattr(layer, name)
        return [] if plain is None else [plain]
    chains: Any = layer.parametrizations
    return [tensor for key, tensor in chains[name].named_parameters(recurse=False) if key.startswith("original")]


def given(layer: nn.Module) -> Tensor:
    """The weight that the map put on last is given: what the layer computes with, but for that map."""
    *earlier, _ = steps_on(layer)
    value, *factors = originals(layer)
    for step in earlier:
        value, factors = step(value, *factors), []
    return value


def replace_last(layer: nn.Module, weight_map: WeightMap) -> None:
    """Put `weight_map` in the place of the map put on last, with the same stored tensors."""
    chains: Any = layer.parametrizations
    chains.weight[-1] = weight_map
