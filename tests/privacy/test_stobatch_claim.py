"""StoBatch's batches and published account; one draw for all hides nothing, and the auditor finds it out."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from trivet.audit.many_run import many_run_bound
from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import build, find, methods
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.privacy.stobatch import StoBatch, features_share, local_epsilon, published_epsilon


@pytest.fixture
def void_claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, whose measurements are made here on a small scale."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("void_claims")


@pytest.mark.parametrize(("claimed", "scale", "honest"), [(0.2, 34.81, 45.05), (2.0, 1.832, 855.9)])
def test_the_scales_published_for_mnist_are_worth_what_local_privacy_says(
    claimed: float, scale: float, honest: float
) -> None:
    """m = 2499, Delta_R = 4950, 784 pixels: worked out by hand from the formulas."""
    share = features_share(claimed, 0.1, 4950, 2499)
    assert published_epsilon(share, 0.1, 4950, 2499) == pytest.approx(claimed)
    assert 4950 / (2499 * share) == pytest.approx(scale, rel=1e-3)
    assert local_epsilon(784, 4950 / (2499 * share)) == pytest.approx(honest, rel=1e-3)


def test_the_published_total_is_the_sum_of_its_four_parts() -> None:
    gamma_x, gamma = 50 / 20, 2 * 50 / (20 * 3.0)
    expected = 0.5 + 0.5 / gamma_x + 0.5 / gamma + 0.1
    assert published_epsilon(0.5, 0.1, 50, 20, kernel_norm=3.0) == pytest.approx(expected)


def test_batches_are_cut_once_and_only_their_order_changes() -> None:
    plan = StoBatch(workers=2).plan(23, 3, 4, seed=1)
    assert plan.per_epoch == 3  # seven batches of three, two a step
    seen = set()
    for step in range(12):
        drawn = plan.draw(step)
        assert len(drawn) == len(drawn.unique()) == 6
        seen |= {tuple(part.tolist()) for part in drawn.split(3)}
    assert len(seen) == 7
    assert len({record for batch in seen for record in batch}) == 21
    epochs = [torch.cat([plan.draw(step) for step in range(first, first + 3)]) for first in (0, 3)]
    assert not torch.equal(*epochs)
    assert all(len(each.unique()) == 18 for each in epochs)  # within a pass without replacement
    assert torch.equal(plan.draw(5), StoBatch(workers=2).plan(23, 3, 4, seed=1).draw(5))


def test_the_gradient_is_the_mean_over_the_workers_batches(void_claims: ModuleType) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    batch = Batch(torch.rand(6, 1, 4, 4), torch.arange(6) % 3, torch.arange(6))
    work = void_claims.Moment(Plain(), Progress(0, 1, 0.0, 0), 0.1)
    StoBatch(workers=2).plan(6, 3, 1, 0).gradients(model, batch, work)
    parts = []
    for index in (slice(0, 3), slice(3, 6)):
        loss = work.losses(model, batch.select(index), batch.inputs[index]).per_example.mean()
        parts.append(torch.autograd.grad(loss, model[1].weight)[0])
    torch.testing.assert_close(model[1].weight.grad, (parts[0] + parts[1]) / 2)


def test_it_ends_privacy_claims_and_every_part_of_it_says_so() -> None:
    rule = build("privacy", "stobatch")
    verdict, reason = rule.on_privacy
    assert verdict is Verdict.VOID
    assert reason.endswith("epsilon is infinite")
    assert getattr(rule.plan(20, 4, 1, 0), "mechanism", None) is None
    assert find("privacy", "stobatch").note.startswith("privacy claim void")
    assert find("objectives", "stobatch").note.startswith("privacy claim void")
    for network in ("stobatch_mlp", "stobatch_cnn"):
        assert find("models", network).note.startswith("privacy claim void")
    assert not any("private" in each.legs for each in methods() if each.name.startswith("stobatch"))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: StoBatch(workers=0), "workers=0"),
        (lambda: StoBatch(workers=3).plan(20, 8, 1, 0), "workers=3 must not need more than the 2 batches"),
        (lambda: features_share(0.1, 0.2, 50, 20), "total=0.1"),
        (lambda: local_epsilon(64, 0.0), "scale=0"),
    ],
)
def test_impossible_settings_are_refused(make, complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        make()


def test_who_knows_the_other_records_reads_one_off_its_noised_form(void_claims: ModuleType) -> None:
    """Noise of mean size 35 on pixels of size 1 is taken off to the last bits of float32."""
    assert void_claims.recovery(digits().train.select(slice(16)), 35.0, seed=0) < 1e-3


def test_digits_are_learned_under_a_shared_draw_and_not_under_independent_ones(void_claims: ModuleType) -> None:
    """At scale 35, where independent draws would cost 2 * 64 / 35 = 3.7 and shared ones protect nothing."""
    shared, independent = (void_claims.under_noise(kind, 35.0, 0, epochs=25) for kind in ("shared", "independent"))
    assert shared > 0.35
    assert independent < 0.2


def test_the_auditor_is_alarmed_by_stobatch(void_claims: ModuleType) -> None:
    """Models trained with a digit and with a black image are told apart far beyond the claimed epsilon of 0.2."""
    data = digits().train.select(slice(8))
    inside, outside = void_claims.stobatch_scores(data, 0.2, runs=30, steps=3, hidden=16, seed=0, eps_labels=0.1)
    found = many_run_bound(inside.numpy(), outside.numpy(), 0.0)
    assert found.lower > 5 * 0.2
