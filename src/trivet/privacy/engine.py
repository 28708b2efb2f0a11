"""The protocol of an engine: the exact sum of clipped per-record gradients, over all views of a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.privacy.gradient_rule import PerExample

Losses = Callable[[nn.Module, Batch, Tensor], PerExample]
"""`losses(model, batch, perturbed)`: [B] losses, each a function of the parameters and of its own record."""
Factors = Callable[[Tensor], Tensor]
"""From the norms [B] of the records' gradients to the factors [B] they are scaled by."""


class ClippedSum(NamedTuple):
    """What an engine returns.

    Attributes:
        total: for each trainable parameter, in the order of `model.parameters()`, sum_i c_i g_i in float32, where
            g_i is the gradient of record i's loss, over everything the model computed for that record, and
            c = factors(norms). A record whose norm is not finite contributes exactly zero.
        norms: [B] float32, l2 norms of the g_i over all trainable parameters jointly; may hold inf or NaN.
        found: the losses, detached.
    """

    total: list[Tensor]
    norms: Tensor
    found: PerExample


class Engine(ABC):
    """Computes per-record gradients of a model in its present mode, clips them and adds them up, all exactly.

    `model.grad` fields, modes, buffers and hooks are as before afterwards, whatever happens.
    """

    @abstractmethod
    def refusal(self, model: nn.Module) -> str | None:
        """Why this engine cannot treat `model`, in one sentence; None if it can."""

    @abstractmethod
    def clipped_sum(
        self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors
    ) -> ClippedSum:
        """The clipped sum for the records of `batch` (at least one) and their `perturbed` inputs [B, ...]."""
