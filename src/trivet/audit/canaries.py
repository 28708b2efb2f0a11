"""Canaries: records made to be noticed, planted in the place of training records to be looked for afterwards.

A canary takes the slot of a training record, whether it is included or not: an excluded one stays in its slot and
its loss counts nothing, which is its removal as far as any sum of gradients knows. So the number of records, the
sampling rate, the steps and the noise are those of the audited training, and the epsilon claimed for that is the
epsilon to refute. Where the claim is about exchanged records, an excluded canary is exchanged instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.audit.leak_test import Trainer, losses
from trivet.data.dataset import Batch, Dataset
from trivet.errors import require
from trivet.models.modes import evaluating
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.privacy.mechanism import Adjacency
from trivet.randomness import generator
from trivet.threats.losses import cross_entropy

Kind = Literal["mislabelled", "dirac"]
Access = Literal["black_box", "white_box"]
DIRAC_SLOPE = 1e4
"""Norm of a Dirac canary's gradient before clipping: above any clip norm in use, so that it is clipped to just that."""


def check(kind: str, access: str) -> None:
    """Refuse what there is not, and what cannot be seen."""
    require(kind in ("mislabelled", "dirac"), f"kind={kind!r} must be 'mislabelled' or 'dirac'.")
    require(access in ("black_box", "white_box"), f"access={access!r} must be 'black_box' or 'white_box'.")
    require(
        kind == "mislabelled" or access == "white_box",
        f"access={access!r} does not show the weight that a dirac canary moves; set access: white_box.",
    )


def seen(access: Access) -> Literal["black box", "white box"]:
    """How findings call it."""
    return "white box" if access == "white_box" else "black box"


class Planted:
    """Canaries in the training records, and what changes with them in a training run: a `Planting`.

    mislabelled: an image with a wrong label, drawn uniformly from the other classes.
    dirac: a record whose whole gradient lies in one weight that nothing else uses. Its loss is DIRAC_SLOPE times
        that weight, which the model holds in an embedding beside its own layers.

    Attributes:
        train: the records to train on; the canaries' slots are the last ones.
        canaries: [m] the canaries themselves.
        included: [m] bool.
    """

    def __init__(
        self, train: Dataset, kind: Kind, included: Tensor, *, seed: int, adjacency: Adjacency, watch: bool = False
    ) -> None:
        """Put canaries in the slots of records chosen by `seed`; the choice does not depend on `included`.

        Args:
            adjacency: what the excluded ones become: nothing (add_remove, zero_out), or (replace) the image with
                its true label, the opposite gradient.
            watch: follow every step of the training for the white-box score of mislabelled canaries.
        """
        count = len(included)
        require(
            1 <= count <= len(train) // 2,
            f"canaries={count} must lie between 1 and half of the {len(train)} records, whose slots they take.",
        )
        require(train.num_classes > 1, f"dataset {train.name!r} has one class, so no record can be mislabelled.")
        self.kind, self.included, self.adjacency, self.watch = kind, included, adjacency, watch
        base, spared = train.split(count, generator(seed, "canaries"))
        offset = torch.randint(1, train.num_classes, (count,), generator=generator(seed, "wrong labels"))
        wrong = (spared.labels + offset) % train.num_classes
        self.canaries = Dataset(spared.images, wrong, train.classes, train.name, train.scale)
        planted = wrong if adjacency != "replace" else torch.where(included, wrong, spared.labels)
        labels = torch.cat([base.labels, planted])
        self.train = Dataset(torch.cat([base.images, spared.images]), labels, train.classes, train.name, train.scale)
        self._objective: PlantedObjective | None = None
        self._model: nn.Module | None = None

    def model(self, model: nn.Module) -> nn.Module:
        self._model = _WithCoordinates(model, len(self.included)) if self.kind == "dirac" else model
        return self._model

    def objective(self, objective: Objective) -> Objective:
        count, ordinary = len(self.included), len(self.train) - len(self.included)
        on, off = self.included.float(), (-1.0 if self.adjacency == "replace" else 0.0) * (~self.included).float()
        if self.kind == "dirac":
            weight, pull = torch.zeros(count), on + off
        else:
            weight, pull = (torch.ones(count) if self.adjacency == "replace" else on), torch.zeros(count)
        self._objective = PlantedObjective(
            objective,
            torch.cat([torch.ones(ordinary), weight]),
            torch.cat([torch.zeros(ordinary), pull]),
            torch.cat([torch.full((ordinary,), count), torch.arange(count)]) if self.kind == "dirac" else None,
            _Watch(self._model, self.canaries) if self.watch and self._model is not None else None,
        )
        return self._objective

    def scores(self, trainer: Trainer, model: nn.Module, number: int) -> Tensor:
        """How much the finished `model` of run `number` looks as if it had seen each canary: [m] float64.

        dirac: how far its weight moved. Watched: sum over the steps of -<theta_t+1 - theta_t, g_i(theta_t)>, the
        update's alignment with the canary's gradient, for plain SGD lr times the inner product with the released
        noisy gradient. Otherwise: the fall of its loss from the untrained to the finished model.
        """
        if isinstance(model, _WithCoordinates):
            return model.coordinates.weight.detach()[:-1, 0].double().cpu()
        if self._objective is not None and self._objective.watch is not None:
            return self._objective.watch.finish(model)
        return losses(trainer.initial(number), self.canaries) - losses(model, self.canaries)


class _WithCoordinates(nn.Module):
    """A model, and beside it one weight for each canary that no image ever reaches.

    Called with int64 [B] canary numbers instead of images, it gives their weights [B]; the number past the last is
    nobody's.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self.coordinates = nn.Embedding(count + 1, 1, padding_idx=count)
        nn.init.zeros_(self.coordinates.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x) if x.is_floating_point() else self.coordinates(x).squeeze(-1)
        return found


@dataclass(init=False)
class PlantedObjective(Objective):
    """weight_i times the loss of record i, minus DIRAC_SLOPE pull_i times the weight planted for it.

    Records are known by their place in the training records. Everything else is as `inner` has it.

    Attributes:
        weight, pull: [N] float32.
        coordinate: [N] int64, the planted weight of each record; None if there are none.
    """

    inner: Objective = field(init=False)
    weight: Tensor = field(init=False)
    pull: Tensor = field(init=False)
    coordinate: Tensor | None = field(init=False)
    watch: _Watch | None = field(init=False)

    def __init__(
        self, inner: Objective, weight: Tensor, pull: Tensor, coordinate: Tensor | None, watch: _Watch | None = None
    ) -> None:
        self.inner, self.weight, self.pull, self.coordinate, self.watch = inner, weight, pull, coordinate, watch

    @property
    def record_isolated(self) -> bool:  # type: ignore[override]
        return self.inner.record_isolated

    @property
    def replays(self) -> int:
        return self.inner.replays

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        if self.watch is not None:
            self.watch.see(model, progress.step)
        return self.inner.perturb(model, batch, progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        found = self.inner.losses(model, batch, perturbed, progress)
        where = batch.index.device
        per_example = self.weight.to(where)[batch.index] * found.per_example
        if self.coordinate is not None:
            pull = DIRAC_SLOPE * self.pull.to(where)[batch.index]
            per_example = per_example - pull * model(self.coordinate.to(where)[batch.index])
        return Losses(per_example, found.log)

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_state(state)


class _Watch:
    """Adds up, step by step, how well a model's updates agree with the canaries' gradients.

    The inner product with a gradient is a directional derivative, so one forward-mode pass gives it for all canaries.
    """

    def __init__(self, model: nn.Module | None, canaries: Dataset) -> None:
        self.model, self.canaries = model, canaries
        self.total = torch.zeros(len(canaries), dtype=torch.float64)
        self.step = -1
        self.before: dict[str, Tensor] = {}

    def see(self, model: nn.Module, step: int) -> None:
        """Take note of the weights at the start of `step`; other models than the one in training are ignored."""
        if model is not self.model or step == self.step:
            return
        self.step = step
        # Contiguous: forward-mode differentiation of GroupNorm fails on the channels-last layout.
        now = {
            name: each.detach().clone(memory_format=torch.contiguous_format)
            for name, each in model.named_parameters()
            if each.requires_grad
        }
        if self.before:
            self._add(model, now)
        self.before = now

    def finish(self, model: nn.Module) -> Tensor:
        """The sums [m], with the last step, which ended in the finished `model`."""
        self.see(model, self.step + 1)
        return self.total

    @torch.no_grad()
    def _add(self, model: nn.Module, now: dict[str, Tensor]) -> None:
        moved = {name: now[name] - before for name, before in self.before.items()}
        device = next(iter(now.values())).device
        # In full precision: training may have asked for autocast, which forward mode does not follow.
        with evaluating(model), torch.autocast(device.type, enabled=False):
            for first, batch in zip(range(0, len(self.canaries), 500), self.canaries.batches(500), strict=True):
                here = batch.to(device)

                def loss(weights: dict[str, Tensor], here: Batch = here) -> Tensor:
                    return cross_entropy(torch.func.functional_call(model, weights, here.inputs), here.labels)

                slope = torch.func.jvp(loss, (self.before,), (moved,))[1]
                self.total[first : first + len(here)] -= slope.double().cpu()
