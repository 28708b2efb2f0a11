"""LiRA against likelihoods written out, on models that learn by heart, and on models that learn nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mpmath import mp
from scipy.stats import norm
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from trivet.audit import membership
from trivet.audit.leak_test import LeakTest, Planting
from trivet.audit.lira import Lira, logit_gap
from trivet.audit.membership import Shadows
from trivet.audit.rmia import Rmia
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue
from trivet.methods import build
from trivet.randomness import generator

CLASSES = ("a", "b", "c", "d")


def records(count: int, seed: int) -> Dataset:
    draw = generator(seed, "records")
    images, labels = torch.rand(count, 1, 2, 2, generator=draw), torch.randint(4, (count,), generator=draw)
    return Dataset(images, labels, CLASSES, "noise", 1.0)


class Table(nn.Module):
    """Knows some images by heart, and answers with noise of its own about all others."""

    def __init__(self, known: Dataset | None, number: int) -> None:
        super().__init__()
        self.known, self.number = known, number

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([torch.randn(4, generator=generator(self.number, repr(each.tolist()))) for each in x])
        if self.known is not None:
            seen = (x.flatten(1)[:, None] == self.known.images.flatten(1)).all(2)
            z += 5.0 * seen.float() @ nn.functional.one_hot(self.known.labels, 4).float()
        return z


class Trainer:
    """Trains tables; those of `forgetful` trainers know nothing."""

    def __init__(self, forgetful: bool) -> None:
        self.forgetful, self.sizes = forgetful, []

    def initial(self, number: int) -> nn.Module:
        return Table(None, number)

    def __call__(self, train: Dataset, *, number: int, planting: Planting | None = None) -> nn.Module:
        self.sizes.append(len(train))
        return Table(None if self.forgetful else train, number)


@pytest.fixture(scope="module")
def data() -> Splits:
    return Splits(records(400, 0), records(100, 1))


TESTS = [Lira(shadows=8), Lira(shadows=8, mode="offline"), Rmia(shadows=4), Rmia(shadows=4, mode="online")]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: f"{type(test).__name__}-{test.mode}")
def test_models_that_know_their_records_by_heart_are_found_out(test: LeakTest, data: Splits) -> None:
    """A threshold placed among 100 non-members: 5 of the other 100 or more above it has a probability below 1e-2."""
    trainer = Trainer(forgetful=False)
    found = test.run(trainer, data, seed=0)
    one_percent = found.low_fpr[0]
    assert one_percent.tpr.value > 0.5
    assert one_percent.fpr.value <= 0.05
    assert (found.members, found.others) == (200, 200)
    assert trainer.sizes == [200] * found.trained
    assert found.lower is None
    assert not found.contradicts
    assert any("no bound on epsilon" in note for note in found.notes)
    assert build("audit", found.spec) == test


@pytest.mark.parametrize("test", TESTS, ids=lambda test: f"{type(test).__name__}-{test.mode}")
def test_models_that_know_nothing_give_nothing_away(test: LeakTest, data: Splits) -> None:
    """Members score like others: the area under the curve is within five standard errors (0.145) of 1/2 (1e-6)."""
    found = test.run(Trainer(forgetful=True), data, seed=0)
    curve = [(0.0, 0.0), *((point.fpr, point.tpr) for point in found.roc)]
    area = np.trapezoid([tpr for _, tpr in curve], [fpr for fpr, _ in curve])
    assert abs(area - 0.5) < 5 * math.sqrt(401 / (12 * 200 * 200))
    low, high = found.low_fpr[0].tpr.interval
    assert low < 0.05
    assert found.low_fpr[0].tpr.value < 0.15
    assert high > 0


def test_the_logit_gap_is_the_log_odds_even_where_the_probability_rounds_to_one() -> None:
    z = torch.tensor([[1.0, 2.0, -1.0], [60.0, 0.0, 1.0], [0.0, 800.0, -800.0], [0.0, 0.0, 1000.0]])
    y = torch.tensor([1, 0, 1, 0])
    mp.dps = 800
    for row, label, found in zip(z.tolist(), y.tolist(), logit_gap(z, y).tolist(), strict=True):
        weights = [mp.e ** mp.mpf(each) for each in row]
        p = weights[label] / sum(weights)
        assert found == pytest.approx(float(mp.log(p) - mp.log(1 - p)), rel=1e-12)
    assert logit_gap(z, y).dtype == torch.float64
    # What it replaces: float32 gives infinity for the second row.
    assert torch.isinf((z.softmax(1)[1, 0] / (1 - z.softmax(1)[1, 0])).log())


def _shadows(models: int, count: int, seed: int) -> Shadows:
    draw = generator(seed, "shadows")
    inside = membership.halves(count, models, seed)
    signal = torch.randn(models, count, generator=draw, dtype=torch.float64) * 2 + 3 * inside
    return Shadows(inside, signal, inside[0], torch.randn(count, generator=draw, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("models", [6, 16, 64])
def test_scores_are_the_likelihoods_written_out(mode: str, models: int) -> None:
    found = _shadows(models, 10, 0)
    scores = Lira(shadows=models, mode=mode).scores(found)
    signal, inside = found.signal.numpy(), found.inside.numpy()
    pooled = []
    for side in (inside, ~inside):
        squares = sum(((signal[side[:, n], n] - signal[side[:, n], n].mean()) ** 2).sum() for n in range(10))
        pooled.append(math.sqrt(squares / (side.sum() - 10)))
    for n in range(10):
        x, fits = float(found.target[n]), []
        for side, shared in zip((inside, ~inside), pooled, strict=True):
            own = signal[side[:, n], n]
            fits.append(norm(np.median(own), np.std(own, ddof=1) if models >= 64 else shared))
        expected = fits[0].logpdf(x) - fits[1].logpdf(x) if mode == "online" else fits[1].cdf(x)
        assert float(scores[n]) == pytest.approx(expected, rel=1e-9)


def test_halves_are_halves_and_every_record_is_in_half_of_the_models() -> None:
    for count in (10, 11):
        inside = membership.halves(count, 8, 3)
        assert set(inside.sum(1).tolist()) <= {count // 2, count - count // 2}
        assert (inside.sum(0) == 4).all()
        assert (inside[0::2] != inside[1::2]).all()
    assert len({tuple(row.tolist()) for row in membership.halves(40, 8, 3)}) == 8


def test_the_attacked_model_is_no_shadow_models_complement(data: Splits) -> None:
    found = membership.train_shadows(Trainer(True), data.train, 6, 5, lambda _: torch.zeros(400), "")
    assert found.inside.shape == (6, 400)
    assert int(found.member.sum()) == 200
    for row in found.inside:
        assert 100 < int((row == found.member).sum()) < 300  # 200 if unrelated; 100 away is 10 standard errors


def test_the_curve_agrees_with_scikit_learn_at_its_thresholds() -> None:
    draw = generator(0, "scores")
    member = torch.rand(3000, generator=draw) < 0.5
    scores = (torch.randn(3000, generator=draw) + member).mul(4).round()  # with ties
    fpr, tpr, _ = roc_curve(member.numpy(), scores.numpy(), drop_intermediate=False)
    known = {round(float(f), 12): round(float(t), 12) for f, t in zip(fpr, tpr, strict=True)}
    found = membership.roc(scores, member)
    assert found[-1].tpr == found[-1].fpr == 1
    assert len(found) > 5
    assert all(known[round(point.fpr, 12)] == round(point.tpr, 12) for point in found)
    continuous = membership.roc(torch.randn(3000, generator=draw), member)
    assert 30 < len(continuous) <= 102
    assert min(point.fpr for point in continuous if point.fpr) < 0.001


def test_the_threshold_is_placed_and_counted_on_different_records() -> None:
    """Of worthless scores at 1 %: on the records that set it, a threshold has at most its nominal rate; on the others
    the rate is right on average. 1,000 repetitions, six standard errors (1e-8)."""
    draw, honest, flattering = generator(0, "scores"), [], []
    for seed in range(1000):
        scores, member = torch.randn(80, generator=draw), torch.arange(80) < 40
        point = membership.low_fpr(scores, member, 0.95, seed)[0]
        assert point.fpr.trials == 20
        honest.append(point.fpr.value)
        flattering.append(float((scores[~member] > scores[~member].max()).float().mean()))
    # The largest of 20 is exceeded by one of the others with a probability of 1/21 each.
    assert abs(np.mean(honest) - 1 / 21) < 6 * np.std(honest) / math.sqrt(1000)
    assert max(flattering) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shadows": 5}, "shadows=5 must be even"),
        ({"shadows": 2}, "shadows=2 must be even and at least 4"),
        ({"mode": "both"}, "mode='both' must be"),
        ({"records": 1}, "records=1 must be at least 4"),
        ({"confidence": 0.0}, "confidence=0.0 must lie"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        Lira(**settings)  # type: ignore[arg-type]
