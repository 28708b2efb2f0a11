"""PreciseBN (Wu & Johnson, 2021): the statistics of BatchNorm measured anew, on the network as it finally is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trivet.claims import Effect, Verdict
from trivet.data.dataset import Dataset
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.models.modes import device_of, evaluating
from trivet.randomness import derive_seed, generator
from trivet.training.stage import Checkpoint, Context, Stage


@method(title="PreciseBN", paper="Wu & Johnson, 2021", year=2021)
@dataclass(frozen=True)
class PreciseBn(Stage):
    """Replace BatchNorm's running mean and variance by averages over batches of training records.

    Those collected in training follow weights that were still moving. Of a randomised network, batches pass through it
    as it answers, with its draws: means and variances are those of the network with its noise. The records are clean;
    after adversarial training, whose statistics are of attacked records, compare before and after. No weight changes.

    Attributes:
        batch_size: records of a batch. Large is better; a last batch smaller than half of it is left out.
        passes: over the training records, each in a fresh order; more passes see more draws.
    """

    batch_size: int = 256
    passes: int = 1

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, f"batch_size={self.batch_size} must be at least 2.")
        require(self.passes >= 1, f"passes={self.passes} must be at least 1.")

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "BatchNorm normalises by other statistics")
        privacy = (Verdict.VOID, "the statistics were taken from the records, without noise")
        same = (Verdict.KEEP, "no weight was added or dropped")
        return Effect(privacy=privacy, certificate=changed, attack=changed, accuracy=changed, cost=same)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model, train = checkpoint.model.to(context.device), context.splits.train
        seed = derive_seed(context.seed, "precise_bn", context.files.number)
        with torch.random.fork_rng(devices=[]):  # layers draw from the global stream
            torch.manual_seed(derive_seed(seed, "layers"))
            moved = estimate(model, train, self.batch_size, self.passes, seed)
        if not moved:
            raise TrivetError(f"{context.files.name} found no BatchNorm with running statistics; leave the stage out.")
        record: dict[str, Any] = {"stage": "precise_bn", "settings": spec_of(self), "layers": moved}
        return replace(checkpoint, history=[*checkpoint.history, record])


@torch.no_grad()
def estimate(model: nn.Module, train: Dataset, batch_size: int, passes: int, seed: int) -> list[str]:
    """Set the running statistics of `model` in place; the names of the layers that have any."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    before = {norm: norm.momentum for norm in norms.values()}
    with evaluating(model):
        try:
            for norm in before:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average over all batches
                norm.train()
            for number in range(passes if norms else 0):
                order = torch.randperm(len(train), generator=generator(seed, "order", number))
                for part in order.split(batch_size):
                    if 2 * len(part) >= min(batch_size, len(train)):
                        model(train.batch(part).inputs.to(device_of(model)))
        finally:
            for norm, momentum in before.items():
                norm.momentum = momentum
    return list(norms)
