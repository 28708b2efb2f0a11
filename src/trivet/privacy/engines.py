"""The choice of the engine that clips per-record gradients."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.privacy.book_keeping import BookKeeping
from trivet.privacy.engine import ClippedSum, Engine, Factors, Losses, Unsuited
from trivet.privacy.materialised import Materialised

Name = Literal["auto", "book_keeping", "materialised"]


def engine_for(model: nn.Module, name: Name = "auto") -> Engine:
    """The engine called `name`; "auto" is book-keeping wherever it can treat the model, else materialised.

    Raises:
        BadValue: an unknown name, or a model that the engine cannot treat.
    """
    offered: dict[str, Engine] = {"auto": Auto(), "book_keeping": BookKeeping(), "materialised": Materialised()}
    if name not in offered:
        raise BadValue(f"engine={name!r} must be one of: {', '.join(offered)}.")
    reason = offered[name].refusal(model)
    if reason is not None:
        raise BadValue(reason)
    return offered[name]


class Auto(Engine):
    """Book-keeping, until a model or its losses turn out to be beyond it; materialised gradients from then on."""

    def __init__(self) -> None:
        self._books, self._rows = BookKeeping(), Materialised()
        self._unsuited = False

    def refusal(self, model: nn.Module) -> str | None:
        return None if self._books.refusal(model) is None else self._rows.refusal(model)

    def at_once(self, model: nn.Module) -> int:
        return self._chosen(model).at_once(model)

    def part(self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors) -> ClippedSum:
        return self._chosen(model).part(model, batch, perturbed, losses, factors)

    def clipped_sum(
        self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors
    ) -> ClippedSum:
        try:
            return self._chosen(model).clipped_sum(model, batch, perturbed, losses, factors)
        except Unsuited:
            self._unsuited = True
            return self._rows.clipped_sum(model, batch, perturbed, losses, factors)

    def _chosen(self, model: nn.Module) -> Engine:
        return self._rows if self._unsuited or self._books.refusal(model) is not None else self._books
