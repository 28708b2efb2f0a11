"""The protocol of a leak test: train models the way the audited one was trained, and try to tell what they saw.

A test that finds nothing proves nothing. One whose lower bound lies above the claimed epsilon refutes the claim.
"""

from __future__ import annotations

import dataclasses
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from trivet.audit.leak_finding import LeakFinding
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, require
from trivet.models.modes import device_of, evaluating
from trivet.objectives.objective import Objective
from trivet.randomness import derive_seed
from trivet.threats.losses import cross_entropy
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.stage import Stage


class Planting(Protocol):
    """What a leak test changes about a training run, besides its records."""

    def model(self, model: nn.Module) -> nn.Module:
        """The model to train, made from the untrained one."""

    def objective(self, objective: Objective) -> Objective:
        """What to minimise instead of a stage's objective."""


class Trainer(Protocol):
    """The audited training, repeatable: everything about it is fixed except the records and the draws."""

    def initial(self, number: int) -> nn.Module:
        """The untrained model that run `number` starts from."""

    def __call__(self, train: Dataset, *, number: int, planting: Planting | None = None) -> nn.Module:
        """The model after training on `train`, with the draws of run `number` (private noise is drawn anew)."""


class LeakTest(ABC):
    """An attack on the training records' privacy, or on that of records planted among them."""

    room: ClassVar[str] = "audit"

    @abstractmethod
    def run(self, trainer: Trainer, data: Splits, *, seed: int, claimed: PrivacyClaim | None = None) -> LeakFinding:
        """Attack models that `trainer` makes of `data.train`, with `data.test` as records it never saw.

        The result is computed from the training records: models made on the way spend as much privacy as any.

        Raises:
            BadValue: too few records for the settings.
        """


@dataclass(frozen=True)
class StageTrainer:
    """Runs a recipe's stages from the start, each time in a folder of its own that is deleted afterwards.

    Attributes:
        stages: named, as the pipeline takes them.
        build: makes the untrained model from a seed.
        test: the test records, for stages that look at them.
        seed: run `number` has the seed derived from it and the number.
        budget_of: SHA-256 of the records whose privacy these models spend; None: of those they are trained on.
    """

    stages: Sequence[tuple[str, Stage]]
    build: Callable[[int], nn.Module]
    test: Dataset
    seed: int
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    budget_of: str | None = None

    def initial(self, number: int) -> nn.Module:
        return self.build(derive_seed(self.seed, "leak test", number)).to(self.device)

    def __call__(self, train: Dataset, *, number: int, planting: Planting | None = None) -> nn.Module:
        model, stages = self.initial(number), self.stages
        if planting is not None:
            model = planting.model(model)
            stages = [(name, _planted(stage, planting)) for name, stage in stages]
        with tempfile.TemporaryDirectory(prefix="trivet-leak-test-") as folder:
            run = RunFolder.create(Path(folder) / "run", "")
            seed = derive_seed(self.seed, "leak test", number)
            splits = Splits(train, self.test)
            checkpoint = run_stages(stages, model, splits, run, seed=seed, device=self.device, budget_of=self.budget_of)
            return checkpoint.model.eval()


def _planted(stage: Stage, planting: Planting) -> Stage:
    if not isinstance(stage, Fit):
        return stage
    require(
        not stage.holdout,
        f"holdout={stage.holdout} moves records about, and canaries are known by their place; leak tests that plant "
        "canaries need holdout 0.",
    )
    return dataclasses.replace(stage, objective=planting.objective(stage.objective))


@torch.no_grad()
def logits(model: nn.Module, data: Dataset) -> Tensor:
    """What `model` says of all records, [N, K] float64 on the CPU."""
    device = device_of(model)
    with evaluating(model):
        found = [model(batch.inputs.to(device)).double().cpu() for batch in data.batches(500)]
    return torch.cat(found)


def losses(model: nn.Module, data: Dataset) -> Tensor:
    """The cross-entropy of all records, [N] float64."""
    return cross_entropy(logits(model, data), data.labels)


def at(claimed: PrivacyClaim | None, delta: float | None, records: int) -> float:
    """The delta to test at: the claim's own, since bounds at different deltas cannot be compared."""
    if delta is None:
        return claimed.delta if claimed is not None else 10.0 ** -(len(str(records)))
    if claimed is not None and delta != claimed.delta:
        raise BadValue(f"delta={delta:g} must be the claim's {claimed.delta:g}, or be left out.")
    return delta
