"""ALT takes the members in turn, each attacked as alone; the recipes of AVG's cheaper forms differ as they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.objectives.alt_at import AltAt
from trivet.objectives.avg_at import AvgAt
from trivet.objectives.pgd_at import PgdAt
from trivet.recipes.plan import plan
from trivet.recipes.recipe import load
from trivet.threats.l1 import L1
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.union import Union
from trivet.training.fit import Fit

THREE = Union((Linf(0.1), L1(1.0), RotationTranslation(shift=0.5, angle=15.0, shifts=3, angles=3)))


def test_step_t_trains_on_the_views_that_avg_makes_of_member_t_mod_k(mlp, batch, progress) -> None:
    for step in range(7):
        now = replace(progress, step=step)
        views = AvgAt(THREE, steps=3).perturb(mlp, batch, now)
        assert torch.equal(AltAt(THREE, steps=3).perturb(mlp, batch, now), views[:, step % 3])


def test_without_a_radius_it_is_plain_training(mlp, batch, progress) -> None:
    none = Union(tuple(member.scaled(0.0) for member in THREE.members))
    for step in range(3):
        losses = AltAt(none, steps=2)(mlp, batch, replace(progress, step=step)).per_example
        torch.testing.assert_close(losses, cross_entropy(mlp(batch.inputs), batch.labels))


def test_of_one_threat_it_is_pgd_training_with_the_same_seed(mlp, batch, progress) -> None:
    ours = AltAt(Linf(0.1), steps=5, loss="ce")(mlp, batch, progress).per_example
    torch.testing.assert_close(ours, PgdAt(Linf(0.1), steps=5)(mlp, batch, progress).per_example)


@pytest.mark.parametrize(("step", "name"), [(3, "1_Linf"), (4, "2_L1"), (5, "3_RT")])
def test_the_log_names_the_type_of_the_step(step: int, name: str, mlp, batch, progress) -> None:
    losses = AltAt(THREE, steps=2)(mlp, batch, replace(progress, step=step))
    assert list(losses.log) == [name]
    assert torch.equal(losses.log[name], losses.per_example.detach())


class Counted(nn.Module):
    """Remembers how many images it was asked about."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.inner(x)


@pytest.mark.parametrize("size", [1, 4])
def test_a_step_trains_on_one_view_of_a_record_where_avg_trains_on_k(size: int, mlp, batch, progress) -> None:
    def seen(make: Callable[..., AltAt | AvgAt]) -> int:
        model, objective = Counted(mlp), make(Union((Linf(0.1), L1(1.0))), steps=2)
        few = Batch(batch.inputs[:size], batch.labels[:size], batch.index[:size])
        perturbed = objective.perturb(model, few, progress)
        model.seen = 0
        objective.losses(model, few, perturbed, progress)
        return model.seen

    assert (seen(AltAt), seen(AvgAt)) == (size, 2 * size)


def fit_of(recipe: str) -> Fit:
    stage = plan(load(recipe)).stages[0][1]
    assert isinstance(stage, Fit)
    return stage


def test_the_recipes_of_avgs_cheaper_forms_differ_in_rate_or_batch_alone() -> None:
    """HALF_LR: B records, the rate over k. HALF_BATCH: B / k records, and k times the steps in as many epochs."""
    avg, half_lr, half_batch = (fit_of(f"digits-avg-at{form}") for form in ("", "-half-lr", "-half-batch"))
    types = len(avg.objective.threat.members)
    assert half_lr == replace(avg, optimizer=replace(avg.optimizer, lr=avg.optimizer.lr / types))
    assert half_batch == replace(avg, batch_size=avg.batch_size // types)
    records = avg.batch_size * 20
    steps = [fit.rule.plan(records, fit.batch_size, fit.epochs, 0).per_epoch * fit.epochs for fit in (avg, half_batch)]
    assert steps[1] == types * steps[0]


def test_the_recipe_of_alt_differs_from_that_of_avg_in_the_objective_alone() -> None:
    alt, avg = fit_of("digits-alt-at"), fit_of("digits-avg-at")
    assert isinstance(alt.objective, AltAt)
    assert alt == replace(avg, objective=AltAt(avg.objective.threat, steps=avg.objective.steps))
