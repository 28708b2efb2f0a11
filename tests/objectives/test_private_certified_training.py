"""Certified training under a private rule: each record's loss is its own, and its gradient is clipped as that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interval_rules import merged_margins
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trivet.claims import PrivacyClaim
from trivet.data.dataset import Batch, Dataset, Splits
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import build
from trivet.objectives.objective import Objective, Progress
from trivet.privacy.engines import engine_for
from trivet.threats.linf import Linf
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.independence import require_independence
from trivet.training.pipeline import run_stages

EPS = 0.05
PRIVATE = ("ibp", "crown_ibp", "sabr", "mtl_ibp", "single_prop")
RULE = {"name": "dp_sgd", "max_grad_norm": 0.5, "delta": 1e-5, "noise_multiplier": 1.0}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).to(dtype)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits().train


def objective(name: str, **settings: Any) -> Objective:
    made: Objective = build("objectives", {"name": name, **settings}, threat=Linf(EPS))
    return made


def by_hand(model: nn.Sequential, x: Tensor, label: Tensor) -> Tensor:
    """0.5 CE + 0.5 CE(-m) of one record, with intervals written out."""
    low, high = ((x + sign * EPS).clamp(0, 1).flatten(1) for sign in (-1, 1))
    margins = merged_margins(model[1:], low, high, label)
    worst = (-margins).exp().sum(1).log1p()
    return (0.5 * cross_entropy(model(x), label, reduction="none") + 0.5 * worst)[0]


@pytest.mark.parametrize("engine", ["auto", "materialised"])
def test_the_clipped_sum_is_that_of_single_records_by_hand(engine: str, data: Dataset) -> None:
    model, bound = net(torch.float64), 1.5
    batch = data.batch(torch.arange(6))
    batch = Batch(batch.inputs.double(), batch.labels, batch.index)
    ibp, progress = objective("ibp", kappa_end=0.5), Progress(9, 10, 9.0, 0)

    def losses(inner: nn.Module, records: Batch, perturbed: Tensor) -> Any:
        return ibp.losses(inner, records, perturbed, progress)

    def factors(norms: Tensor) -> Tensor:
        return (bound / norms).clamp(max=1.0)

    perturbed = ibp.perturb(model, batch, progress)
    found = engine_for(model, engine).clipped_sum(model, batch, perturbed, losses, factors)  # type: ignore[arg-type]
    expected = [torch.zeros_like(p) for p in model.parameters()]
    norms = []
    for i in range(6):
        loss = by_hand(model, batch.inputs[i : i + 1], batch.labels[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(float(torch.cat([each.flatten() for each in gradients]).norm()))
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, bound / norms[-1])
    assert min(norms) < bound < max(norms)  # some are clipped, some are not
    assert found.norms.tolist() == pytest.approx(norms)
    for total, other in zip(found.total, expected, strict=True):
        torch.testing.assert_close(total, other)


@pytest.mark.parametrize("name", PRIVATE)
def test_the_probe_finds_no_record_in_the_gradient_of_another(name: str, data: Dataset) -> None:
    made = objective(name)
    assert made.record_isolated
    require_independence(net(), made, data)


@pytest.mark.parametrize("name", ["ibp", "taps"])
def test_a_loss_that_couples_records_is_refused_by_private_rules(name: str) -> None:
    """The warm-up regularizer is one number for the whole batch."""
    settings = {"regularizer": 0.5} if name == "ibp" else {}
    made = objective(name, **settings)
    assert not made.record_isolated
    with pytest.raises(BadValue, match="couples the records of a batch"):
        build("training", {"name": "fit", "objective": made, "epochs": 1, "batch_size": 64, "rule": RULE})


def test_the_warm_up_regularizer_does_couple_records(data: Dataset) -> None:
    model, progress = net(), Progress(1, 10, 1.0, 0)
    batch = data.batch(torch.arange(4))
    other = Batch(batch.inputs.clone(), batch.labels, batch.index)
    other.inputs[-1] = 0.5
    for weight, alike in ((0.0, True), (0.5, False)):
        made = objective("ibp", regularizer=weight, ramp=(0.0, 1.0))
        first, second = (made(model, each, progress).per_example[:3] for each in (batch, other))
        assert torch.allclose(first, second, rtol=1e-6, atol=0) == alike


@pytest.mark.parametrize("name", ["ibp", "crown_ibp"])
def test_a_private_run_on_digits_claims_its_epsilon_and_moves_the_weights(
    name: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    part = data.select(torch.arange(192))
    stage: Fit = build(
        "training",
        {"name": "fit", "objective": name, "epochs": 2, "batch_size": 64, "rule": {**RULE, "delta": 1e-3}},
        threat=Linf(EPS),
    )
    run = RunFolder.create(tmp_path / "run", "recipe")
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    checkpoint = run_stages([("fit", stage)], model, Splits(part, part), run, seed=5, device=torch.device("cpu"))
    (claim,) = (each for each in checkpoint.ledger.claims if isinstance(each, PrivacyClaim))
    assert claim.holds
    assert 0 < claim.value < 10
    moved = [float((a.detach() - b).abs().max()) for a, b in zip(checkpoint.model.parameters(), before, strict=True)]
    assert all(0 < each < 10 for each in moved)
