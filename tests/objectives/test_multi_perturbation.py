"""MAX and AVG: their reductions to single attacks, the maximum record by record, and the paper's trade-off by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.avg_at import AvgAt
from trivet.objectives.max_at import MaxAt
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.slide import Slide
from trivet.threats.union import Union

RT = RotationTranslation(shift=0.5, angle=15.0, shifts=3, angles=3)
THREE = Union((Linf(0.1), L1(1.0), RT))


@pytest.mark.parametrize("kind", [MaxAt, AvgAt])
def test_of_one_threat_both_are_pgd_training_with_the_same_seed(kind, mlp, batch, progress) -> None:
    ours = kind(Linf(0.1), steps=5, loss="ce")(mlp, batch, progress).per_example
    torch.testing.assert_close(ours, PgdAt(Linf(0.1), steps=5)(mlp, batch, progress).per_example)


@pytest.mark.parametrize("kind", [MaxAt, AvgAt])
def test_copies_of_one_threat_change_nothing(kind, mlp, batch, progress) -> None:
    one, three = (kind(Union((L1(1.0),) * k), steps=4)(mlp, batch, progress).per_example for k in (1, 3))
    torch.testing.assert_close(one, three)


@pytest.mark.parametrize("kind", [MaxAt, AvgAt])
def test_without_a_radius_both_are_plain_training(kind, mlp, batch, progress) -> None:
    natural = cross_entropy(mlp(batch.inputs), batch.labels)
    none = kind(Union((Linf(0.0), L1(0.0), L2(0.0), RT.scaled(0.0))), steps=2)
    torch.testing.assert_close(none(mlp, batch, progress).per_example, natural)
    ramp = kind(THREE, steps=2, eps_ramp=0.5)
    torch.testing.assert_close(ramp(mlp, batch, replace(progress, step=0)).per_example, natural)


def test_max_is_the_largest_loss_of_the_members_and_avg_their_mean(mlp, batch, progress) -> None:
    """Each member's own attack, run alone, finds what it finds in company."""
    alone = torch.stack([MaxAt(each, steps=5)(mlp, batch, progress).per_example for each in THREE.members])
    worst, mean = (kind(THREE, steps=5)(mlp, batch, progress) for kind in (MaxAt, AvgAt))
    torch.testing.assert_close(worst.per_example, alone.amax(0))
    torch.testing.assert_close(mean.per_example, alone.mean(0))
    assert bool((worst.per_example >= alone).all())
    for (name, logged), own in zip(mean.log.items(), alone, strict=True):
        assert name in ("1_Linf", "2_L1", "3_RT")
        torch.testing.assert_close(logged, own.detach())


class TwoScores(nn.Module):
    """Even rows are scored by one pixel, odd rows by all of them; class 1 where the score has risen by much."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        score = torch.where(torch.arange(len(x)) % 2 == 0, 8 * (flat[:, 0] - 0.5), (flat - 0.5).sum(1))
        return torch.stack((torch.ones_like(score), score), 1)


def test_max_chooses_the_type_for_each_record_not_for_the_batch() -> None:
    """The one pixel of record 0 gives most to l_1 (0.4 > 0.1), the sixteen of record 1 to l_inf (1.6 > 0.4)."""
    batch = Batch(torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 0]), torch.arange(2))
    threat = Union((Linf(0.1), L1(0.4)))
    found = MaxAt(threat, steps=20).perturb(TwoScores(), batch, Progress(0, 1, 0.0, 0)) - batch.inputs
    largest = found.abs().flatten(1).amax(1)
    assert float(largest[0]) > 0.2
    assert float(largest[1]) == pytest.approx(0.1, abs=1e-6)


def test_points_lie_in_their_members_and_avg_keeps_them_in_order(convnet, batch, progress) -> None:
    norms = Union((Linf(0.1), L1(1.0), L2(0.4)))
    views = AvgAt(norms, steps=3).perturb(convnet, batch, progress)
    assert views.shape == (8, 3, *batch.inputs.shape[1:])
    for number, member in enumerate(norms.members):
        assert bool(member.contains(views[:, number], batch.inputs).all())
    assert bool(norms.contains(MaxAt(norms, steps=3).perturb(convnet, batch, progress), batch.inputs).all())


@pytest.mark.parametrize("kind", [MaxAt, AvgAt])
def test_per_record_gradients_are_those_of_single_records(kind, mlp, batch, progress) -> None:
    """What a private gradient rule clips: vmap over records gives the gradient of each record alone."""
    objective = kind(THREE, steps=3)
    perturbed = objective.perturb(mlp, batch, progress)
    weights = {name: parameter.detach() for name, parameter in mlp.named_parameters()}

    def loss(weights, inputs, label, point):
        one = Batch(inputs[None], label[None], torch.zeros(1, dtype=torch.long))

        def model(x):
            return torch.func.functional_call(mlp, weights, (x,))

        return objective.losses(model, one, point[None], progress).per_example[0]

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weights, batch.inputs, batch.labels, perturbed)
    for record in range(3):
        mlp.zero_grad()
        kept = slice(record, record + 1)
        one = Batch(batch.inputs[kept], batch.labels[kept], batch.index[kept])
        objective.losses(mlp, one, perturbed[kept], progress).per_example.sum().backward()
        for name, parameter in mlp.named_parameters():
            torch.testing.assert_close(together[name][record], parameter.grad, rtol=1e-4, atol=1e-6)


def test_step_sizes_are_given_member_by_member(mlp, batch, progress) -> None:
    still = AvgAt(Union((Linf(0.1), Linf(0.1))), steps=3, step_sizes=(0.0, 0.05)).perturb(mlp, batch, progress)
    start = Linf(0.1).random_start(batch.inputs, progress.generator("start"))
    torch.testing.assert_close(still[:, 0], start)
    assert not torch.allclose(still[:, 1], start)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"draws": 0}, {"eps_ramp": 1.0}, {"step_sizes": (0.1,)}])
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        MaxAt(THREE, **wrong)


class Weighted(nn.Module):
    """sign(c x_0 + sum_i x_i / sqrt(d)) of features scaled into [0, 1], as two logits."""

    def __init__(self, c: float, d: int) -> None:
        super().__init__()
        self.weight = torch.cat((torch.tensor([c]), torch.full((d,), d**-0.5))).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x.flatten(1) - 0.5) * SCALE @ self.weight
        return torch.stack((-score, score), 1)


SCALE = 30.0


@pytest.mark.parametrize("c", [0.1, 1.0, 2.0, 4.0])
def test_the_papers_trade_off_by_attacks_agrees_with_its_closed_form(c: float) -> None:
    """y = +-1, x_0 = y with probability 0.95, x_i ~ N(y eta, 1), eta = alpha / sqrt(d): no classifier does well twice.

    l_inf at 2 eta takes 2 eta (c + sqrt(d)) of the margin, l_1 at 2 takes 2 max(c, 1 / sqrt(d)); the mean of the two
    risks is at least one half. Shares of 2000 records within five standard errors of theirs: false alarm 6e-7 each.
    """
    d, alpha, p0, records = 100, 3.0, 0.95, 2000
    eta, draw = alpha / math.sqrt(d), torch.Generator().manual_seed(0)
    y = torch.randint(2, (records,), generator=draw)
    sign = 2.0 * y.double()[:, None] - 1
    first = torch.where(torch.rand(records, 1, generator=draw) < p0, sign, -sign)
    rest = sign * eta + torch.randn(records, d, generator=draw, dtype=torch.float64)
    x = (0.5 + torch.cat((first, rest), 1) / SCALE)[:, None, None]
    assert 0 < float(x.min()) < float(x.max()) < 1

    def closed(taken: float) -> float:
        left = alpha - taken
        return p0 * phi(-(c + left)) + (1 - p0) * phi(-(left - c))

    attacks = (
        (PGD(Linf(2 * eta / SCALE), 5, random_start=False), closed(2 * eta * (c + math.sqrt(d)))),
        (Slide(L1(2 / SCALE), 5, quantiles=(1.0, 1.0), random_start=False), closed(2 * max(c, d**-0.5))),
    )
    risks = []
    for attack, expected in attacks:
        measured = float(attack.run(Weighted(c, d), x, y).broken.double().mean())
        assert measured == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / records) + 1e-9)
        risks.append(measured)
    assert sum(risks) / 2 >= 0.5 - 5 * 0.5 / math.sqrt(records)


def phi(z: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
