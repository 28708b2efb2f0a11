"""The stage that trains the body of a network on other data first, for transfer to the recipe's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trivet.claims import Effect, PrivacyClaim, Verdict
from trivet.compression.structure import Structure
from trivet.data.dataset import Dataset, Splits
from trivet.errors import FieldError, TrivetError, require
from trivet.methods import build, method, spec_of
from trivet.models.taps import last_linear
from trivet.randomness import derive_seed, generator
from trivet.training.pipeline import advance
from trivet.training.stage import Checkpoint, Context, Stage


@method(
    title="Pre-training for transfer; robust tickets",
    paper="Fu et al., DAC 2023",
    year=2023,
    legs="robust small",
    note="written from the published settings, the paper's text was not at hand",
)
@dataclass(frozen=True)
class Pretrain(Stage):
    """Train the network on a source with a head of the source's classes; then it gets its own back, as it was before.

    The head is the last linear layer; all else is the body, theta_pre, and every part of it is handed on: weights,
    statistics of BatchNorm and masks. A robust ticket is a sparse body whose source training was adversarial:

        OMP   pretrain [fit pgd_at]                    prune magnitude, scope global, head excluded
        IMP   pretrain [fit pgd_at, imp]               or `imp` after it, on the recipe's own data
        LMP   pretrain [fit pgd_at, fit with hydra]    scores: random; weights frozen

    then `fit` (fine-tuning, masks fixed) or `linear_evaluation` on the recipe's data with a natural loss. A natural
    ticket has eps 0, or `plain`. The normalisation that a model brings along is part of the body, the same for all.

    That robust tickets transfer better is not promised. Measured with OMP from MNIST (14x14, l_inf 0.02) to 200 of the
    digits, five paired seeds, robust less natural in points of clean accuracy with standard errors, 0 / 80 / 90 / 95 /
    98 % dropped: linear +2.8 (0.3), +3.4 (1.0), +0.8 (1.3), -0.8 (0.7), +0.6 (4.6); fine-tuned within 0.8 of zero, each
    interval of 95 % with zero in it. PGD-10 at 0.05 left more of robust tickets; that is an attack, no certificate.

    Privacy: the recipe's own records are not read, and a source that shares a record with them is refused. Of the
    source's records, the stage's record says what protected them, which unless a private rule trained here is nothing;
    a claim of a later private stage is about the recipe's records, and says so.

    Attributes:
        data: the source, as `data` of a recipe has it, with `train_limit` for its first records only. Its inputs must
            have the shape of the recipe's; `adapted` resizes them.
        stages: what is done on the source, in order, each with its name: `{name: fit, …}`.
    """

    data: dict[str, Any] | str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, "stages=[] trains nothing; name one, such as {name: fit, …}.")

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "the weights were trained on other data")
        privacy = (Verdict.KEEP, "the records of the recipe were not read")
        cost = (Verdict.VOID, "the weights may have been compressed")
        return Effect(privacy=privacy, certificate=changed, attack=changed, accuracy=changed, cost=cost)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        if checkpoint.structure:
            raise TrivetError(f"{context.files.name} trains a dense network; compress after it, or within it.")
        source = self._source()
        _require_transfer(source, context.splits)
        seed = derive_seed(context.seed, "pretrain", context.files.number)
        model = checkpoint.model.to(context.device)
        stages = [(str(spec_of(each).get("name", "stage")), each) for each in self.stages]
        with _other_head(model, context.splits.train.num_classes, source.train.num_classes, seed) as head:
            after = advance(stages, Checkpoint(model), source, context.files.inside(), seed=seed, device=context.device)
            _require_whole(head, after.structure)
        record = {
            "stage": "pretrain",
            "settings": spec_of(self),
            "source": {
                "name": source.train.name,
                "records": len(source.train),
                "sha256": source.train.digest(),
                "privacy": [each.statement for each in after.ledger.holding if isinstance(each, PrivacyClaim)],
            },
            "stages": after.history,
        }
        model.eval()
        return replace(checkpoint, model=model, history=[*checkpoint.history, record], structure=after.structure)

    def _source(self) -> Splits:
        settings: dict[str, Any] = {"name": self.data} if isinstance(self.data, str) else dict(self.data)
        limits = {part: settings.pop(f"{part}_limit", None) for part in ("train", "test")}
        try:
            splits: Splits = build("data", settings, expects=Splits)
        except FieldError as error:
            raise FieldError(("pretrain", "data", *error.path), error.text) from None
        return splits.limited(**limits)


def _require_transfer(source: Splits, own: Splits) -> None:
    require(
        source.train.input_shape == own.train.input_shape,
        f"data={source.train.name} has inputs {source.train.input_shape}, the recipe's data {own.train.input_shape}; "
        "resize one of them with {name: adapted, of: …, size: …}.",
    )
    seen = set(_pictures(source.train))
    shared = sum(picture in seen for part in (own.train, own.test) for picture in _pictures(part))
    require(
        shared == 0,
        f"data={source.train.name} holds {shared} of the recipe's own images, so that nothing is transferred and what "
        "is measured on them means nothing; choose another source, or classes that the recipe does not use.",
    )


def _pictures(records: Dataset) -> Iterator[bytes]:
    """Each record's inputs, to compare."""
    for batch in records.batches(1000):
        yield from (each.tobytes() for each in batch.inputs.numpy())


@contextmanager
def _other_head(model: nn.Module, own: int, others: int, seed: int) -> Iterator[str]:
    """Inside, the last linear layer is a fresh one for other classes; its name is what is yielded."""
    head = last_linear(model)
    name = next(name for name, module in model.named_modules() if module is head)
    require(
        head.out_features == own,
        f"the last linear layer, {name!r}, gives {head.out_features} numbers and not one for each of {own} classes: it "
        "is no head that could be exchanged.",
    )
    parent, _, attribute = name.rpartition(".")
    fresh = nn.Linear(head.in_features, others, head.bias is not None, head.weight.device, head.weight.dtype)
    bound, draw = 1.0 / math.sqrt(head.in_features), generator(seed, "head")
    with torch.no_grad():
        for tensor in fresh.parameters():
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=draw))
    setattr(model.get_submodule(parent), attribute, fresh)
    try:
        yield name
    finally:
        setattr(model.get_submodule(parent), attribute, head)


def _require_whole(head: str, structure: Structure) -> None:
    if any(head in spec.get(key, ()) for spec in structure for key in ("include", "keep")):
        raise TrivetError(
            f"the head {head!r} was compressed on the source, or its inputs cut out, and it is exchanged now; add it "
            "to exclude, and cut after pretrain."
        )
