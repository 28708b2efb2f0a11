"""The protocol of a stage: takes a checkpoint, returns a checkpoint, and says what it did to every claim."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from trivet.claims import Effect, Ledger
from trivet.compression.structure import Structure
from trivet.data.dataset import Splits
from trivet.errors import TrivetError
from trivet.models.fingerprint import fingerprint
from trivet.training.folder import StageFiles


@dataclass
class Checkpoint:
    """What flows through a recipe.

    Attributes:
        model: maps images [B, C, H, W] in [0, 1] to logits [B, K]; or, as a policy, stacks of observations
            [B, frames, 1, D] to values of actions [B, K].
        ledger: the claims made about it so far, holding and voided.
        history: one record per stage it went through.
        structure: the compressions attached to the model.
    """

    model: nn.Module
    ledger: Ledger = field(default_factory=Ledger)
    history: list[dict[str, Any]] = field(default_factory=list)
    structure: Structure = field(default_factory=list)

    @property
    def artefact(self) -> str:
        """The hash of the present weights, which claims are bound to."""
        return fingerprint(self.model)


@dataclass(frozen=True)
class Context:
    """What a stage may use: the data, the run's seed, and its own corner of the run folder.

    `records` is None in a recipe that learns from an environment instead.
    `budget_of` is the SHA-256 of the records whose privacy is spent, where those trained on were made from them, as
    leak tests do; None: those trained on.
    """

    records: Splits | None
    seed: int
    files: StageFiles
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget_of: str | None = None

    @property
    def splits(self) -> Splits:
        """The records; refused where there are none."""
        if self.records is None:
            raise TrivetError(f"{self.files.name} trains on records, and the recipe names an environment instead.")
        return self.records


class Stage(ABC):
    """One step of a recipe. It may be killed at any moment and run again with the same context."""

    room: ClassVar[str] = "training"

    @abstractmethod
    def effect(self) -> Effect:
        """What this stage does to the claims of each kind."""

    @abstractmethod
    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint after this stage. Claims are the caller's business, except those the stage issues."""
