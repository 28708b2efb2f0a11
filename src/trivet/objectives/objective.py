"""The protocol of an objective: per-example losses of a model on a batch, and numbers worth logging."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trivet import randomness
from trivet.data.dataset import Batch, Dataset
from trivet.models.surrogate import Precision


class Losses(NamedTuple):
    """What an objective returns.

    Attributes:
        per_example: [B], differentiable in the model's parameters; their mean is what plain training minimises.
        log: named scalars or [B] tensors for the log, detached; tensors are averaged.
    """

    per_example: Tensor
    log: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Progress:
    """Where training stands when an objective is asked.

    Attributes:
        step, steps: the current optimiser step and how many there will be.
        epoch: the current pass over the data (fractional).
        seed: of the run, the source of every generator.
        precision: the arithmetic of the training step; attacks inside it use the same for gradients.
        part: number of the piece of a batch that was cut to fit in memory; its randomness is its own.
    """

    step: int
    steps: int
    epoch: float
    seed: int
    precision: Precision = "fp32"
    part: int = 0

    @property
    def fraction(self) -> float:
        """How much of training is done, in [0, 1)."""
        return self.step / self.steps

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator of its own for `purpose` in this step; the same again when the step is replayed on resume."""
        part = (self.part,) if self.part else ()
        return randomness.generator(self.seed, "objective", purpose, self.step, *part, device=device)


class Objective(ABC):
    """What training minimises, as two acts: find inputs (`perturb`), and price the model on them (`losses`).

    Class attributes say what holds for every instance:
        record_isolated: a record's loss depends on no other record, so per-record clipping is meaningful. Losses
            that couple records set it to False and are refused under a private gradient rule.
        replays: optimiser steps taken on each batch, as methods that reuse one backward pass for weights and inputs
            want (free adversarial training).
    """

    room: ClassVar[str] = "objectives"
    record_isolated: ClassVar[bool] = True

    @property
    def replays(self) -> int:
        return 1

    @property
    def needs_holdout(self) -> bool:
        """Whether `judge` must be called, hence training records must be set aside."""
        return False

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """The inputs [B, ...] the model is to be trained on; detached. The clean ones unless overridden.

        All randomness of a step belongs here, so that `losses` is a function. A method that trains on several views
        of a record returns [B, views, ...]: the first dimension is always the record.
        """
        return batch.inputs

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        """The losses of `model` (in its training mode) on `batch` and its `perturbed` inputs [B, ...]."""

    def __call__(self, model: nn.Module, batch: Batch, progress: Progress) -> Losses:
        return self.losses(model, batch, self.perturb(model, batch, progress), progress)

    def judge(self, model: nn.Module, held: Dataset, progress: Progress) -> Mapping[str, float]:
        """Further numbers of held-out records for the log, at the end of an epoch; `model` is in eval mode.

        A method may adapt to what it sees here, which is part of its state. Not called where nothing is held out.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors that survive from step to step, saved so that a resumed run is the same run."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned."""
