"""The mean gradient over shuffled batches: ordinary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.privacy.gradient_rule import GradientRule, PerExample, Plan, Work
from trivet.randomness import generator


@method(title="Mean gradient", name="mean")
@dataclass(frozen=True)
class MeanGradient(GradientRule):
    """The gradient of the mean loss, each epoch in a fresh random order: no privacy at all."""

    needs_isolation: ClassVar[bool] = False
    on_privacy: ClassVar[tuple[Verdict, str]] = (
        Verdict.VOID,
        "trained with plain gradients on the records: epsilon is infinite",
    )

    def plan(self, records: int, batch_size: int, epochs: int, seed: int) -> Plan:
        return _Shuffled(records, batch_size, seed)


class _Shuffled(Plan):
    """Every record once an epoch; the last batch may be smaller."""

    def __init__(self, records: int, batch_size: int, seed: int) -> None:
        self.records, self.batch_size, self.seed = records, batch_size, seed
        self.per_epoch = -(-records // batch_size)
        self._epoch, self._batches = -1, ()

    def draw(self, step: int) -> Tensor:
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self.records, generator=generator(self.seed, "order", epoch))
            self._epoch, self._batches = epoch, order.split(self.batch_size)
        return self._batches[number]

    def gradients(self, model: nn.Module, batch: Batch, work: Work) -> PerExample:
        found = work.losses(model, batch, work.perturb(model, batch))
        found.per_example.mean().backward()
        return found
