"""The protocol of a gradient rule: from per-example losses to one update direction, and what it spends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.methods import method


class PerExample(Protocol):
    """Losses [B] of a batch and numbers for the log, as objectives return them."""

    @property
    def per_example(self) -> Tensor: ...
    @property
    def log(self) -> Mapping[str, Tensor]: ...


class GradientRule(ABC):
    """Writes an update direction into the parameters' `.grad`; states what that does to a privacy claim.

    Class attributes:
        needs_isolation: refuses objectives whose losses couple records.
        on_privacy: verdict on an earlier privacy claim, with its reason.
    """

    room: ClassVar[str] = "privacy"
    needs_isolation: ClassVar[bool]
    on_privacy: ClassVar[tuple[Verdict, str]]

    @abstractmethod
    def gradients(self, model: nn.Module, batch: Batch, losses: Callable[[nn.Module, Batch], PerExample]) -> PerExample:
        """Fill `.grad` of every trainable parameter of `model` from `losses(model, batch)`, and return those."""


@method(title="Mean gradient", name="mean")
@dataclass(frozen=True)
class MeanGradient(GradientRule):
    """The gradient of the mean loss: ordinary training, no privacy at all."""

    needs_isolation: ClassVar[bool] = False
    on_privacy: ClassVar[tuple[Verdict, str]] = (
        Verdict.VOID,
        "trained with plain gradients on the records: epsilon is infinite",
    )

    def gradients(self, model: nn.Module, batch: Batch, losses: Callable[[nn.Module, Batch], PerExample]) -> PerExample:
        found = losses(model, batch)
        found.per_example.mean().backward()
        return found
