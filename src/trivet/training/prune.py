"""The stage that prunes once: weights are scored, the least of them dropped, and nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivet.claims import Effect, Verdict
from trivet.compression.compression import steps_on
from trivet.compression.masks import Mask, Masks
from trivet.compression.pattern import Pattern
from trivet.compression.pruner import LossOf, Pruner
from trivet.compression.scope import Scope, chosen
from trivet.compression.unstructured import Unstructured
from trivet.data.dataset import Dataset
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.models.baking import baked
from trivet.objectives.objective import Objective, Progress
from trivet.randomness import derive_seed, generator
from trivet.training.stage import Checkpoint, Context, Stage

_BATCH = 128
"""Records whose loss is computed together; the mean over batches is what is differentiated."""
_LAST = Progress(step=999, steps=1000, epoch=0.0, seed=0)
"""Losses are those of the end of training: radii that grow are at their full size."""


@method(title="Pruning", legs="small")
@dataclass(frozen=True)
class Prune(Stage):
    """Keep the share `density` of the weights with the largest scores; they stay masked in later stages.

    The scores are a `Pruner`'s. One that reads weights alone keeps a privacy claim, as post-processing does. One that
    reads the loss on records ends it, and no later stage can claim privacy: no noise hides what the masks tell.

    LWM, the baseline of robust pruning, is `fit`, this with `magnitude`, and `fit`. The record of the stage holds how
    many weights each layer keeps. A layer that keeps none is an error.

    Attributes:
        pruner: what scores the weights.
        density: the share of weights to keep, in (0, 1], over all chosen layers together.
        pattern: which weights are kept or dropped together.
        scope: how the density is spread: the same in each layer ("layerwise"), by scores compared over all layers
            ("global"), or by the layers' shapes ("erk"); None for what the pruner's paper does.
        include, exclude: shell patterns over the names of the layers, as in a compression.
        objective: whose loss a pruner reads that needs one.
        records: training records it is computed on, drawn at random, as many of each class as can be.
    """

    pruner: Pruner
    density: float = 0.1
    pattern: Pattern = field(default_factory=Unstructured)
    scope: Scope | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    objective: Objective | None = None
    records: int = 512

    def __post_init__(self) -> None:
        name = spec_of(self.pruner).get("name", type(self.pruner).__name__)
        require(0 < self.density <= 1, f"density={self.density} must lie in (0, 1].")
        require(self.records >= 1, f"records={self.records} must be at least 1.")
        require(
            not self.pruner.reads_records or self.objective is not None,
            f"objective=None leaves {name} without a loss to read; name one, such as plain or pgd_at.",
        )
        require(
            self.pruner.reads_records or self.objective is None,
            f"objective={type(self.objective).__name__} is read by no part of {name}; leave it out.",
        )

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "the weights were pruned")
        privacy = (Verdict.KEEP, "the weights were chosen by looking at weights alone")
        if self.pruner.reads_records:
            privacy = (Verdict.VOID, "which weights stay was read off the records, without noise")
        return Effect(privacy=privacy, certificate=changed, attack=changed, accuracy=changed, cost=changed)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model = checkpoint.model.to(context.device)
        seed = derive_seed(context.seed, "prune", context.files.number)
        masks = Masks(include=self.include, exclude=self.exclude)
        masks.attach(model)
        layers, maps = masks.layers(model), masks.maps(model)
        losses = self._losses(context, seed)
        for step in range(1, self.pruner.steps + 1):
            with torch.random.fork_rng(devices=[]):  # layers draw from the global stream
                torch.manual_seed(derive_seed(seed, "layers", step))
                scores = self.pruner.score(
                    baked(model).train(),
                    list(layers),
                    context.splits.train.input_shape,
                    losses,
                    generator(seed, "scores", step),
                )
            scores = _dropped_first({name: live(layers[name]) for name in layers}, scores)
            density = self.density ** (step / self.pruner.steps)
            for name, keep in chosen(scores, self.pattern, density, self.scope or self.pruner.scope).items():
                maps[name].mask.copy_(keep)
        structure = [*checkpoint.structure, spec_of(Masks(include=tuple(layers)))]
        record = self._record({name: live(layer) for name, layer in layers.items()}, context)
        model.eval()
        return replace(checkpoint, model=model, history=[*checkpoint.history, record], structure=structure)

    def _record(self, kept: Mapping[str, Tensor], context: Context) -> dict[str, Any]:
        for name, mask in kept.items():
            if not bool(mask.any()):
                raise TrivetError(
                    f"{context.files.name} leaves no weight of {name} at density {self.density:g}, and nothing gets "
                    "through it any more; raise density, set scope to layerwise or erk, or exclude the layer."
                )
        weights = sum(mask.numel() for mask in kept.values())
        record = {
            "stage": "prune",
            "settings": spec_of(self),
            "kept": {name: int(mask.sum()) for name, mask in kept.items()},
            "density": sum(int(mask.sum()) for mask in kept.values()) / weights,
        }
        if self.pruner.reads_records:  # a private stage that finds this knows that the records were not protected
            train = context.splits.train
            record |= {"records": min(self.records, len(train)), "data": train.digest()}
        return record

    def _losses(self, context: Context, seed: int) -> Sequence[LossOf]:
        objective = self.objective
        if objective is None:
            return ()
        train = context.splits.train
        index = balanced(train, self.records, generator(seed, "records"))
        objective.load_state({})

        def loss_on(part: Tensor, number: int) -> LossOf:
            batch = train.batch(part).to(context.device)
            progress = replace(_LAST, seed=seed, part=number)
            return lambda model: objective(model, batch, progress).per_example.mean()

        return [loss_on(part, number) for number, part in enumerate(index.split(_BATCH))]


def balanced(records: Dataset, count: int, draw: torch.Generator) -> Tensor:
    """The positions [count] of records drawn without replacement, from each class as nearly the same number."""
    order = torch.randperm(len(records), generator=draw)
    turn = torch.empty_like(order)
    for label in records.labels.unique():
        (own,) = (records.labels[order] == label).nonzero(as_tuple=True)
        turn[own] = torch.arange(len(own))
    return order[turn.argsort(stable=True)[:count]]


def live(layer: nn.Module) -> Tensor:
    """Which weights of a layer no mask holds at zero."""
    kept = torch.ones_like(layer.weight, dtype=torch.bool)  # type: ignore[arg-type]
    for step in steps_on(layer):
        if isinstance(step, Mask):
            kept &= step.mask
    return kept


def _dropped_first(kept: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores in which weights that were dropped before come just below all others: they are not to come back."""
    live = torch.cat([scores[name][mask] for name, mask in kept.items()])
    below = torch.nextafter(live.min(), torch.full_like(live.min(), -torch.inf))
    return {name: torch.where(mask, scores[name], below) for name, mask in kept.items()}
