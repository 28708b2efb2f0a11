"""SIDP does what was published, its released weights carry no noise, and the auditor finds it out."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import build, find
from trivet.models.lenet5 import lenet5
from trivet.objectives.objective import Losses
from trivet.privacy.dp_sgd import DpSgd
from trivet.privacy.gradient_rule import Plan
from trivet.privacy.sidp import Sidp, released_weights_mu
from trivet.statistics import gaussian_epsilon

BATCH = 6


@pytest.fixture
def void_claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, whose audits are run here on a small scale."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("void_claims")


@dataclass(frozen=True)
class CrossEntropy:
    """The work of a step."""

    rate: float = 0.5

    def perturb(self, model: nn.Module, batch: Batch, part: int = 0) -> Tensor:
        return batch.inputs

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> Losses:
        return Losses(F.cross_entropy(model(perturbed), batch.labels, reduction="none"))


class Linear(CrossEntropy):
    """loss_i = <x_i, theta>: its gradient is the record, wherever it is taken."""

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> Losses:
        return Losses(model(perturbed.flatten(1))[:, 0])


class Norm(CrossEntropy):
    """loss_i = ||theta||^2 / 2: its gradient is the weights, so that it shows where it was taken."""

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> Losses:
        squares = sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))
        return Losses(squares.expand(len(batch)) / 2)


@pytest.fixture
def records() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.rand(20, 1, 4, 4, generator=generator), torch.arange(20) % 3, torch.arange(20))


def plan(noise_multiplier: float, clip: float = 1.0, seed: int = 0) -> Plan:
    return Sidp(max_grad_norm=clip, noise_multiplier=noise_multiplier).plan(20, BATCH, 5, seed)


def trained(model: nn.Module, records: Batch, plan: Plan, work: CrossEntropy, steps: int) -> Tensor:
    """The weights after `steps` of plain descent; the batches do not depend on the plan's seed."""
    order = torch.Generator().manual_seed(5)
    for step in range(steps):
        plan.draw(step)
        plan.gradients(model, records.select(torch.randint(20, (BATCH,), generator=order)), work)
        with torch.no_grad():
            for p in model.parameters():
                p -= work.rate * p.grad
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_without_noise_it_is_clipped_descent(records: Batch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = records.select(torch.arange(5))
    found = plan(0.0, clip=0.3).gradients(model, batch, CrossEntropy())
    rows = []
    for i in range(5):
        one = batch.select(slice(i, i + 1))
        row = torch.autograd.grad(F.cross_entropy(model(one.inputs), one.labels), list(model.parameters()))
        flat = torch.cat([each.flatten() for each in row])
        assert flat.norm() > 0.3
        rows.append(flat * 0.3 / flat.norm())
    mine = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(mine, torch.stack(rows).mean(0))
    torch.testing.assert_close(found.per_example, F.cross_entropy(model(batch.inputs), batch.labels, reduction="none"))


def test_gradients_are_taken_at_weights_noised_by_lr_c_z_over_b_and_the_weights_put_back(records: Batch) -> None:
    """64,000 values: their deviation lies within 2 % but for odds below 1e-11."""
    model, work = nn.Linear(16, 4000), Norm(rate=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    rule = Sidp(max_grad_norm=1e6, noise_multiplier=2e-6)
    step = rule.plan(20, BATCH, 5, 0)
    noises = []
    for number in range(2):
        step.draw(number)
        step.gradients(model, records.select(torch.arange(BATCH)), work)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        noises.append(torch.cat([(p.grad - p).detach().flatten() for p in model.parameters()]))
    for noise in noises:
        assert float(noise.std()) == pytest.approx(0.5 * 1e6 * 2e-6 / BATCH, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 0.03


def test_the_weights_are_put_back_when_a_loss_fails(records: Batch) -> None:
    model = nn.Linear(16, 3)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError):
        plan(1.0).gradients(model, Batch(torch.rand(2, 1, 5, 5), torch.zeros(2).long(), torch.arange(2)), Linear())
    assert torch.equal(model.weight, before)


def test_under_a_linear_loss_the_weights_are_an_exact_sum_of_records_whatever_the_noise(records: Batch) -> None:
    """Identical over noise seeds; exchanging x for -x in all its k participations moves them by 2 k lr / B."""
    unit = records.inputs / records.inputs.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    data = Batch(unit, records.labels, records.index)
    exchanged = Batch(torch.cat([-unit[:1], unit[1:]]), records.labels, records.index)

    def weights(batch: Batch, seed: int) -> Tensor:
        model = nn.Linear(16, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        batch = Batch(batch.inputs.double(), batch.labels, batch.index)
        return trained(model, batch, plan(7.1, seed=seed), Linear(), 10)

    order = torch.Generator().manual_seed(5)
    k = sum(int((torch.randint(20, (BATCH,), generator=order) == 0).sum()) for _ in range(10))
    assert k > 0
    torch.testing.assert_close(weights(data, 1), weights(data, 2), rtol=0, atol=1e-14)
    moved = (weights(data, 1) - weights(exchanged, 3)).norm()
    assert float(moved) == pytest.approx(2 * k * 0.5 / BATCH, rel=1e-6)


def test_dp_sgd_at_the_same_z_accumulates_noise_and_sidp_has_none() -> None:
    """Var(theta_T) = T (lr C z / B)^2 against 0, over 40,000 weights that no record touches (3 %: odds 1e-17)."""
    dark = Batch(torch.zeros(20, 1, 4, 4), torch.zeros(20).long(), torch.arange(20))
    private = DpSgd(max_grad_norm=1.0, delta=1e-3, noise_multiplier=2.0, noise_seed=0).plan(20, BATCH, 5, 0)
    for each, variance in ((private, 4 * (0.5 * 2.0 / BATCH) ** 2), (plan(2.0), 0.0)):
        model = nn.Linear(16, 2500, bias=False)
        nn.init.zeros_(model.weight)
        weights = trained(model, dark, each, Linear(), 4)
        assert float(weights.var()) == pytest.approx(variance, rel=0.03)


def test_batch_normalised_losses_are_differentiated_one_by_one_through_the_graph_of_the_batch() -> None:
    model = lenet5((1, 12, 12), 3, norm="mixed_batch", generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 2, 0]), torch.arange(4))
    plan(0.0, clip=0.5).gradients(model, batch, CrossEntropy())
    losses = F.cross_entropy(model(batch.inputs), batch.labels, reduction="none")
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for loss in losses:
        row = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        factor = min(1.0, 0.5 / float(torch.cat([each.flatten() for each in row]).norm())) / 4
        expected = [old + factor * each for old, each in zip(expected, row, strict=True)]
    for p, reference in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, reference, rtol=1e-4, atol=1e-6)


def test_batches_are_drawn_with_replacement_and_again_the_same() -> None:
    here, again, elsewhere = plan(1.0), plan(1.0), plan(1.0, seed=1)
    drawn = [here.draw(step) for step in range(50)]
    assert all(len(index) == BATCH for index in drawn)
    assert any(len(index.unique()) < BATCH for index in drawn)
    assert torch.equal(torch.stack(drawn), torch.stack([again.draw(step) for step in range(50)]))
    assert not torch.equal(torch.stack(drawn), torch.stack([elsewhere.draw(step) for step in range(50)]))
    assert here.per_epoch == 4


def test_mu_of_the_released_samples_in_its_closed_forms() -> None:
    assert released_weights_mu([0.1] * 49, [1], 2.0) == pytest.approx(math.sqrt(49) / 2)
    assert released_weights_mu([0.3], [1], 2.0) == pytest.approx(1 / 2)
    assert released_weights_mu([0.3], [1], 2.0, exchanged=True) == pytest.approx(1.0)
    assert released_weights_mu([0.3] * 5, [], 2.0) == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mu_is_the_shift_of_the_optimizers_weights_in_units_of_each_releases_noise(momentum: float) -> None:
    """A record whose clipped gradient is always 1, through PyTorch's own SGD."""
    rates, taken = [0.1 * 0.9**t for t in range(12)], [2, 5, 5, 9]
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
    total = 0.0
    for step, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor(float(taken.count(step)), dtype=torch.float64)
        optimizer.step()
        total += (float(weight.detach()) / rate) ** 2
    assert released_weights_mu(rates, taken, 7.1, momentum) == pytest.approx(math.sqrt(total) / 7.1)


def test_mu_at_the_authors_setting_for_mnist() -> None:
    """Epsilon 267 and 7,670, where the account of DP-SGD would say about 0.03."""
    once, each = ([1], [1 + 1875 * epoch for epoch in range(10)])
    for steps, mu, epsilon in ((once, 19.3, 267), (each, 119.7, 7670)):
        found = released_weights_mu([0.1] * 18_750, steps, 7.1)
        assert found == pytest.approx(mu, abs=0.05)
        assert gaussian_epsilon(found, 1e-5) == pytest.approx(epsilon, abs=1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (([0.1], [2], 1.0), "participations"),
        (([0.1], [0], 1.0), "participations"),
        (([0.0], [1], 1.0), "rates"),
        (([0.1], [1], 0.0), "noise_multiplier=0"),
        (([0.1], [1], 1.0, 1.0), "momentum=1"),
    ],
)
def test_schedules_without_a_bound_are_refused(settings: tuple, complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        released_weights_mu(*settings)


@pytest.mark.parametrize("wrong", [{"max_grad_norm": 0.0}, {"noise_multiplier": -1.0}, {"noise_multiplier": math.inf}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        Sidp(**wrong)


def test_it_ends_privacy_claims_and_says_so_wherever_it_is_named() -> None:
    rule = build("privacy", "sidp")
    verdict, reason = rule.on_privacy
    assert verdict is Verdict.VOID
    assert reason.endswith("epsilon is infinite")
    assert getattr(rule.plan(20, 4, 1, 0), "mechanism", None) is None
    assert find("privacy", "sidp").note.startswith("privacy claim void")


def test_the_closed_form_step_of_the_audit_is_the_rules_step(void_claims: ModuleType) -> None:
    """What the audit below audits is SIDP as it stands in the package."""
    data = digits().train.select(slice(12))
    task = void_claims.Regression.with_canary(data)
    model = nn.Linear(65, 10, bias=False)
    batch = Batch(task.records, task.targets.argmax(1), torch.arange(13))
    plan(0.0, clip=1.0).gradients(model, batch, CrossEntropy())
    weights = model.weight.detach().T[None]
    total = task.clipped_sum(weights, torch.ones(1, 13), 1.0)[0]
    torch.testing.assert_close(model.weight.grad, total.T / 13)


def test_the_auditor_is_alarmed_by_sidp_and_not_by_dp_sgd(void_claims: ModuleType) -> None:
    """At confidence 1 - 1e-6, which is one minus the odds of a false alarm about DP-SGD."""
    task = void_claims.Regression.with_canary(digits().train.select(slice(64)))
    setting = void_claims.Setting(steps=80)
    lower = {
        (method, name): found["lower"]
        for method in ("dp_sgd", "sidp")
        for name, found in void_claims.bounds(task, setting, method, 200, 1 - 1e-6, seed=0).items()
    }
    claimed = setting.accountant
    assert 0.2 < claimed < 0.8
    assert lower["dp_sgd", "weights"] <= claimed
    assert lower["sidp", "mean weights"] > 2 * claimed
    assert lower["sidp", "mean of samples"] > claimed
