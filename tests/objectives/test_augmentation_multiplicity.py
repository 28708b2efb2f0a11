"""Augmentation multiplicity: every copy's own draws, the right record's mean, and any objective inside."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from trivet.data.augment import Augmentation, HorizontalFlip, RandomCrop
from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.augmentation_multiplicity import AugmentationMultiplicity
from trivet.objectives.awp import Awp
from trivet.objectives.dp_cert import DpCert
from trivet.objectives.free_at import FreeAt
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.stability import Stability
from trivet.objectives.trades import Trades
from trivet.threats.linf import Linf

INNER = {
    "plain": Plain(),
    "pgd_at": PgdAt(Linf(0.1), steps=2),
    "trades": Trades(Linf(0.1), steps=2),
    "one view": Gaussian(0.3),
    "views": Gaussian(0.3, samples=3),
    "views beside the clean copy": Stability(0.3),
    "dp_cert": DpCert(0.3, "macer"),
}


@dataclass(frozen=True)
class Unchanged(Augmentation):
    def __call__(self, inputs, generator):
        return inputs


def test_every_copy_of_every_record_has_draws_of_its_own(mlp, progress) -> None:
    """Crops of an image with distinct pixels tell their place by one pixel: 9 places, drawn 16 times a record."""
    image = torch.arange(1.0, 65.0).view(1, 8, 8) / 64
    batch = Batch(image.repeat(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    copies = AugmentationMultiplicity((RandomCrop(1),), Plain(), copies=16).perturb(mlp, batch, progress)
    assert copies.shape == (8, 16, 1, 8, 8)
    places = copies[:, :, 0, 4, 4]
    # A record that sees two places or fewer: C(9, 2) (2/9)^16, about 1e-9; two records alike: 9^-16.
    assert all(len(set(row)) > 2 for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) == 8
    assert set(places.flatten().tolist()) == set(image[0, 3:6, 3:6].flatten().tolist())


def test_draws_are_fresh_in_every_step_and_part(mlp, batch) -> None:
    objective = AugmentationMultiplicity((RandomCrop(2),), Plain(), copies=4)
    moments = [Progress(3, 10, 0.0, 1), Progress(4, 10, 0.0, 1), Progress(3, 10, 0.0, 1, part=1)]
    found = [objective.perturb(mlp, batch, moment) for moment in moments]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0], objective.perturb(mlp, batch, moments[0]))


@pytest.mark.parametrize("name", INNER)
def test_the_loss_is_the_inner_one_of_each_copy_with_its_label_averaged_over_the_record(
    name, mlp, batch, progress
) -> None:
    inner, augment = INNER[name], (RandomCrop(1), HorizontalFlip())
    found = AugmentationMultiplicity(augment, inner, copies=3)(mlp, batch, progress).per_example
    inputs, generator = batch.inputs.repeat_interleave(3, 0), progress.generator("augment")
    for each in augment:
        inputs = each(inputs, generator)
    copies = Batch(inputs, batch.labels.repeat_interleave(3), batch.index.repeat_interleave(3))
    each = inner(mlp, copies, progress).per_example
    expected = torch.stack([each[3 * record : 3 * record + 3].mean() for record in range(8)])
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, found.flip(0), atol=1e-2)


@pytest.mark.parametrize("name", INNER)
def test_one_unchanged_copy_is_the_inner_objective(name, mlp, batch, progress) -> None:
    ours = AugmentationMultiplicity((Unchanged(),), INNER[name], copies=1)(mlp, batch, progress).per_example
    torch.testing.assert_close(ours, INNER[name](mlp, batch, progress).per_example)


def test_objectives_that_couple_records_are_refused() -> None:
    for inner in (Awp(Trades(Linf(0.1))), FreeAt(Linf(0.1))):
        with pytest.raises(BadValue, match=rf"objective={type(inner).__name__} couples records"):
            AugmentationMultiplicity((HorizontalFlip(),), inner)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(BadValue, match="copies=0"):
        AugmentationMultiplicity((HorizontalFlip(),), Plain(), copies=0)
    with pytest.raises(BadValue, match=r"augment=\(\)"):
        AugmentationMultiplicity((), Plain())


@dataclass(frozen=True)
class Counting(Objective):
    """With a state, and with two steps on each batch."""

    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    replays = 2

    def losses(self, model, batch, perturbed, progress) -> Losses:
        return Losses(model(perturbed).sum(1))

    def state(self):
        return self.seen

    def load_state(self, state) -> None:
        self.seen.update(state)


def test_state_replays_and_threat_are_those_of_the_inner_objective() -> None:
    inner = Counting()
    ours = AugmentationMultiplicity((HorizontalFlip(),), inner)
    ours.load_state({"steps": torch.tensor(3)})
    assert ours.state() == {"steps": torch.tensor(3)} == inner.seen
    assert ours.replays == 2
    assert ours.threat is None
    assert AugmentationMultiplicity((HorizontalFlip(),), INNER["trades"]).threat == Linf(0.1)
