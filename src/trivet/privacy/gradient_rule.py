"""The protocol of a gradient rule: which records a step sees, what it makes of their losses, and what that spends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch


class PerExample(Protocol):
    """Losses [B] of a batch and numbers for the log, as objectives return them."""

    @property
    def per_example(self) -> Tensor: ...
    @property
    def log(self) -> Mapping[str, Tensor]: ...


class Work(Protocol):
    """What the training loop offers a rule in one step: the objective's two acts, bound to this moment.

    A rule may cut its batch into parts; it numbers them from 0, so that equal parts do not draw equal randomness.
    """

    @property
    def rate(self) -> float:
        """The learning rate of this step."""

    def perturb(self, model: nn.Module, batch: Batch, part: int = 0) -> Tensor:
        """The inputs [B, ...] or [B, views, ...] that the model is trained on; detached."""

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> PerExample:
        """The losses [B], differentiable in the parameters of `model`."""


class Plan(ABC):
    """One training stage's sampler and update, made together so that they cannot disagree.

    Attributes:
        per_epoch: steps that make up one pass over the records.
    """

    per_epoch: int

    @abstractmethod
    def draw(self, step: int) -> Tensor:
        """The records [B] int64 of step number `step`; there may be none."""

    @abstractmethod
    def gradients(self, model: nn.Module, batch: Batch, work: Work) -> PerExample:
        """Fill `.grad` of every trainable parameter of `model` for this `batch`; its losses [B], detached or not."""


class GradientRule(ABC):
    """Makes the plan of a training stage; states what that does to a privacy claim.

    Class attributes:
        needs_isolation: refuses objectives whose losses couple records.
        on_privacy: verdict on an earlier privacy claim, with its reason.
    """

    room: ClassVar[str] = "privacy"
    needs_isolation: ClassVar[bool]
    on_privacy: ClassVar[tuple[Verdict, str]]

    @abstractmethod
    def plan(self, records: int, batch_size: int, epochs: int, seed: int) -> Plan:
        """The plan for `epochs` passes over `records` records, `batch_size` a step; `seed` is for public draws.

        Raises:
            BadValue: settings that cannot work for so many records.
        """
