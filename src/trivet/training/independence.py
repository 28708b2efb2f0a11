"""Does every record's gradient depend on that record alone? Tried out, on random images, before a private run starts.

Per-record clipping bounds what a record contributes only if its loss, and the attack inside it, look at no other.
Module lists cannot tell: a batch is also coupled by BatchNorm without weights, by x - x.mean(0) in somebody's
forward, by a loss that divides by the batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch, Dataset
from trivet.errors import TrivetError
from trivet.models.modes import evaluating
from trivet.objectives.objective import Objective, Progress
from trivet.privacy.engines import Name, engine_for
from trivet.privacy.gradient_rule import PerExample

_RECORDS = 4
_TOLERANCE = 1e-6  # relative, in float64: rounding lies at 1e-15, coupling far above


def require_independence(model: nn.Module, objective: Objective, data: Dataset, engine: Name = "auto") -> None:
    """Refuse a `model` and `objective` that couple records of the shape of `data`; neither is changed.

    So is an objective whose records the clipping `engine` would take for others: one that stacks its views in
    another order than record by record. The images are random: what is found out depends on no private record.

    Raises:
        TrivetError: with the module, where one is to blame, and the mend.
    """
    _require_no_batch_statistics(model)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        probed, records = copy.deepcopy(model).cpu().double().train(), _random_records(data)
        _probe(probed, objective, records)
        _require_exact_sums(probed, objective, records, engine)


def _require_no_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        running = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        if batch_norm or running:
            kind = type(module).__name__ + " with running statistics" * running
            raise TrivetError(
                f"{name or 'the model'} is a {kind}, which mixes the records of a batch, so no record's share can be "
                "bounded; use norm: group or norm: none."
            )


def _random_records(data: Dataset) -> Batch:
    """Twice _RECORDS records, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((2 * _RECORDS, *data.input_shape), generator=generator, dtype=torch.float64)
    labels = torch.randint(data.num_classes, (2 * _RECORDS,), generator=generator)
    return Batch(inputs, labels, torch.arange(2 * _RECORDS) % len(data))


def _probe(model: nn.Module, objective: Objective, records: Batch) -> None:
    ours = torch.arange(_RECORDS)
    others = torch.cat([ours[:1], ours[1:] + _RECORDS])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first, second = (_first_record(model, objective, records.select(index)) for index in (ours, others))
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise TrivetError(
                f"buffer {name} of the model changes in a training step: it would carry statistics of private records "
                "past the noise; freeze it or leave it out."
            )
    for what, one, other in zip(("inputs", "loss", "gradient"), first, second, strict=True):
        if not _close(one, other):
            raise TrivetError(
                f"the {what} of a record changes when other records of its batch are replaced, in "
                f"{type(objective).__name__} with this model, so no record's share can be bounded; take what mixes "
                "records out of the model or the loss."
            )
    _require_no_batch_size(model, objective, records.select(ours))


def _require_exact_sums(model: nn.Module, objective: Objective, records: Batch, engine: Name) -> None:
    """The engine's clipped sum must be that of records which are treated one at a time."""
    progress = Progress(step=1, steps=2, epoch=0.5, seed=0)
    perturbed = objective.perturb(model, records, progress)

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> PerExample:
        return objective.losses(model, batch, perturbed, progress)

    def clipped(batch: Batch, inputs: Tensor) -> Tensor:
        found = chosen.clipped_sum(model, batch, inputs, losses, lambda norms: 1 / (1 + norms))
        return torch.cat([each.flatten() for each in found.total])

    with evaluating(model):  # without Dropout, whose draws depend on the shape
        chosen = engine_for(model, engine)
        together, again = (clipped(records, perturbed) for _ in range(2))
        alone = sum(clipped(records.select([i]), perturbed[i : i + 1]) for i in range(len(records)))
    if _close(together, again) and not _close(together, torch.as_tensor(alone)):
        raise TrivetError(
            f"{type(objective).__name__} hands the views of its records to the model in an order that clipping cannot "
            "follow; stack them record by record, as perturbed.flatten(0, 1) does, or set engine: materialised."
        )


def _first_record(model: nn.Module, objective: Objective, batch: Batch) -> Iterator[Tensor]:
    """The perturbed input, the loss and the gradient of the first record of a batch; every draw the same each time."""
    progress = Progress(step=1, steps=2, epoch=0.5, seed=0)
    torch.manual_seed(0)
    perturbed = objective.perturb(model, batch, progress)
    loss = objective.losses(model, batch, perturbed, progress).per_example[0]
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable, allow_unused=True)
    gradients = [each.flatten() for each in found if each is not None]
    return iter((perturbed[0], loss.detach(), torch.cat(gradients)))


@torch.no_grad()
def _require_no_batch_size(model: nn.Module, objective: Objective, batch: Batch) -> None:
    progress = Progress(step=1, steps=2, epoch=0.5, seed=0)
    torch.manual_seed(0)
    perturbed = objective.perturb(model, batch, progress)
    with evaluating(model):  # without Dropout, whose draws depend on the shape
        whole = objective.losses(model, batch, perturbed, progress).per_example[:2]
        part = objective.losses(model, batch.select(slice(0, 2)), perturbed[:2], progress).per_example
        again = objective.losses(model, batch, perturbed, progress).per_example[:2]
    if _close(whole, again) and not _close(whole, part):  # a model that draws even now cannot be compared
        raise TrivetError(
            f"the losses of {type(objective).__name__} depend on how many records are in the batch; return each "
            "record's own loss and leave means to the gradient rule."
        )


def _close(one: Tensor, other: Tensor) -> bool:
    scale = max(float(one.abs().max()), float(other.abs().max()), 1e-12)
    return bool((one - other).abs().max() <= _TOLERANCE * scale)
