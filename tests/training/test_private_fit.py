"""Private training from end to end: what it claims, what it refuses, what a kill costs, and what voids it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.claims import Effect, PrivacyClaim, Verdict
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, FieldError, TrivetError
from trivet.methods import build
from trivet.models.fingerprint import fingerprint
from trivet.objectives.plain import Plain
from trivet.privacy.accounting import account
from trivet.privacy.budget import spendings
from trivet.privacy.mechanism import Event
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.private_stage import rounded_up
from trivet.training.stage import Checkpoint, Context, Stage

THREAT = build("threats", {"name": "linf", "eps": 0.1})
RULE = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}


@pytest.fixture(autouse=True)
def _budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))


def blobs(count: int = 96, seed: int = 0) -> Dataset:
    """Images whose class is the brighter half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :2] += 120
    images[labels == 1, :, 2:] += 120
    return Dataset(images, labels, ("top", "bottom"), "blobs")


SPLITS = Splits(blobs(), blobs(40, 1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))


def fit(rule: dict[str, Any] | None = None, **settings: Any) -> Fit:
    spec = {"name": "fit", "objective": "plain", "epochs": 3, "batch_size": 24, "rule": {**RULE, **(rule or {})}}
    made: Fit = build("training", spec | settings, threat=THREAT)
    return made


def trained(folder: Path, *stages: Stage, splits: Splits = SPLITS, model: nn.Module | None = None) -> Checkpoint:
    run = RunFolder.create(folder, "recipe")
    named = [(f"stage{number}", stage) for number, stage in enumerate(stages)]
    return run_stages(named, model or net(), splits, run, seed=5, device=torch.device("cpu"))


def privacy_claims(checkpoint: Checkpoint) -> list[PrivacyClaim]:
    return [claim for claim in checkpoint.ledger.claims if isinstance(claim, PrivacyClaim)]


def test_a_private_run_claims_what_the_accountant_says_of_its_steps(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "run", fit())
    (claim,) = privacy_claims(checkpoint)
    event = Event("poisson", 24 / 96, 1.0)
    assert claim.value == account([(event, 12)], 1e-3).epsilon
    assert claim.holds
    assert (claim.delta, claim.adjacency) == (1e-3, "add_remove")
    assert claim.artefact == fingerprint(checkpoint.model)
    assert claim.statement.startswith(f"({rounded_up(claim.value)}, 0.001)-differentially private for each of the 96")
    (spent,) = spendings()
    assert (spent.steps, spent.event, spent.data) == (12, event, SPLITS.train.digest())


def test_a_target_is_met_and_not_exceeded(tmp_path: Path) -> None:
    (claim,) = privacy_claims(trained(tmp_path / "run", fit({"noise_multiplier": None, "epsilon": 2.0})))
    assert 1.98 <= claim.value <= 2.0


def test_it_learns_what_there_is_to_learn(tmp_path: Path) -> None:
    model = trained(tmp_path / "run", fit(epochs=15, optimizer={"name": "sgd", "lr": 0.5, "weight_decay": 0})).model
    batch = SPLITS.test.batch(torch.arange(40))
    assert float((model(batch.inputs).argmax(1) == batch.labels).float().mean()) > 0.9


@pytest.mark.parametrize("objective", ["pgd_at", "trades", {"name": "gaussian", "sigma": 0.2, "samples": 3}])
def test_robust_objectives_cost_no_privacy(objective: Any, tmp_path: Path) -> None:
    plain, robust = (
        privacy_claims(trained(tmp_path / name, fit(objective=each)))[0]
        for name, each in (("plain", "plain"), ("robust", objective))
    )
    assert robust.value == plain.value


def test_two_private_stages_compose_into_one_claim(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "run", fit(), fit({"noise_multiplier": 2.0}))
    first, second = privacy_claims(checkpoint)
    assert not first.holds
    assert second.holds
    assert second.value > first.value
    events = [(Event("poisson", 0.25, z), 12) for z in (1.0, 2.0)]
    assert second.value == account(events, 1e-3).epsilon


@dataclass(frozen=True)
class Halve(Stage):
    """Some work on the weights, with a verdict on privacy."""

    verdict: Verdict

    def effect(self) -> Effect:
        void = (Verdict.VOID, "other weights")
        judged = (self.verdict, "masks were learned on the private records")
        return Effect(privacy=judged, certificate=void, attack=void, accuracy=void, cost=void)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        with torch.no_grad():
            for parameter in checkpoint.model.parameters():
                parameter *= 0.5
        return checkpoint


def test_post_processing_carries_the_claim_over_to_the_new_weights(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "run", fit(), Halve(Verdict.KEEP))
    (claim,) = privacy_claims(checkpoint)
    assert claim.holds
    assert claim.artefact == fingerprint(checkpoint.model)


def test_pruning_or_calibrating_on_private_records_voids_the_claim(tmp_path: Path) -> None:
    (claim,) = privacy_claims(trained(tmp_path / "run", fit(), Halve(Verdict.VOID)))
    assert claim.voided is not None
    assert "private records" in claim.voided.reason


@pytest.mark.parametrize("order", [("plain", "private"), ("private", "plain")])
def test_plain_training_on_the_records_leaves_no_claim(order: tuple[str, str], tmp_path: Path) -> None:
    stages = {"private": fit(), "plain": build("training", {"name": "fit", "objective": "plain", "epochs": 1})}
    checkpoint = trained(tmp_path / "run", *(stages[each] for each in order))
    assert not any(claim.holds for claim in privacy_claims(checkpoint))
    if order[0] == "plain":
        assert "without protection" in checkpoint.history[-1]["privacy"]["standing"]


def test_a_fixed_noise_seed_is_reproducible_and_not_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = fit({"noise_seed": 3})
    first, second = (trained(tmp_path / name, stage) for name in ("first", "second"))
    assert first.artefact == second.artefact
    assert privacy_claims(first) == []
    assert first.history[-1]["privacy"]["standing"] == "reproducible, not private"
    assert "reproducible, not private" in capsys.readouterr().err
    assert spendings() == []


def test_without_one_no_two_runs_are_the_same(tmp_path: Path) -> None:
    first, second = (trained(tmp_path / name, fit()) for name in ("first", "second"))
    assert first.artefact != second.artefact
    (claim,) = privacy_claims(second)
    assert any("1 other run used the same records" in condition for condition in claim.conditions)


def test_the_log_holds_no_exact_losses_unless_asked(tmp_path: Path) -> None:
    trained(tmp_path / "quiet", fit())
    (claim,) = privacy_claims(trained(tmp_path / "loud", fit({"diagnostics": True})))
    quiet, loud = ((tmp_path / name / "log.jsonl").read_text() for name in ("quiet", "loud"))
    assert "loss" not in quiet
    assert "loss" in loud
    assert any("diagnostics not private" in condition for condition in claim.conditions)


def test_nothing_in_a_run_folder_tells_a_seed_of_the_noise(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "run", fit(save_every=2))
    assert "seed" not in json.dumps(checkpoint.history[-1]["privacy"])
    assert checkpoint.history[-1]["settings"]["rule"]["noise_seed"] is None


def test_a_record_of_nan_gradients_stops_nothing_and_shows_nowhere(tmp_path: Path) -> None:
    class Explodes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.flatten(1).sum(1) > 0).to(x).view(-1, 1)

    data = blobs()
    data.images[7] = 0
    model = nn.Sequential(nn.Flatten(), Explodes(), nn.Linear(16, 2))
    checkpoint = trained(tmp_path / "run", fit(), splits=Splits(data, data), model=model)
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.model.state_dict().values())
    assert "nan" not in (tmp_path / "run" / "log.jsonl").read_text().lower()


@dataclass(frozen=True)
class Twice(Plain):
    """Takes two steps on every batch."""

    @property
    def replays(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("rule", "settings", "reason"),
    [
        ({"delta": 1 / 96}, {}, r"delta=0.0104167 must be below 1 / 96: .* take 1e-03"),
        ({}, {"holdout": 10}, "holdout=10 would publish exact accuracies"),
        ({}, {"objective": "free_at"}, "FreeAt couples the records of a batch"),
        ({}, {"objective": {"import": "test_private_fit:Twice"}}, "Twice steps 2 times on one batch"),
        ({}, {"objective": {"name": "awp", "objective": "trades"}}, "couples the records of a batch"),
        ({}, {"batch_size": 200}, "batch_size=200 must not exceed the 96 records"),
        ({"epsilon": 1.0}, {}, "epsilon= or noise_multiplier= must be given, and not both"),
        ({"noise_multiplier": None}, {}, "epsilon= or noise_multiplier= must be given, and not both"),
        ({"adjacency": "replace"}, {}, "adjacency='replace' has no tight account under Poisson"),
        ({"sampling": "shuffled", "adjacency": "add_remove"}, {}, "cannot be promised for shuffled batches"),
        ({"sampler": {"import": "mine:WeightedSampler"}}, {}, "dp_sgd has no such setting; it has: .*sampling"),
        ({"noise": "discrete_gaussian", "noise_seed": 1}, {}, "can neither be repeated nor left out"),
        ({"max_grad_norm": 0}, {}, "max_grad_norm=0.0 must be positive and finite"),
    ],
)
def test_what_cannot_be_private_is_refused(
    rule: dict[str, Any], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises((BadValue, FieldError, TrivetError), match=reason):
        trained(tmp_path / "run", fit(rule, **settings))
    assert spendings() == []


def test_batch_norm_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(TrivetError, match="1 is a BatchNorm2d, which mixes the records of a batch"):
        trained(tmp_path / "run", fit(), model=model)
    assert spendings() == []


def test_shuffled_batches_are_accounted_without_amplification(tmp_path: Path) -> None:
    poisson, shuffled = (
        privacy_claims(trained(tmp_path / sampling, fit({"sampling": sampling})))[0]
        for sampling in ("poisson", "shuffled")
    )
    assert shuffled.value > 1.5 * poisson.value
    assert shuffled.adjacency == "zero_out"
    assert any("without amplification" in condition for condition in shuffled.conditions)


@pytest.mark.parametrize(
    ("rule", "warning"), [({"delta": 0.005}, "delta is above a tenth"), ({"noise_multiplier": 0.3}, "promises little")]
)
def test_weak_promises_carry_a_warning(rule: dict[str, Any], warning: str, tmp_path: Path) -> None:
    (claim,) = privacy_claims(trained(tmp_path / "run", fit(rule)))
    assert any(warning in condition for condition in claim.conditions)


def test_noise_on_a_grid_is_claimed_by_its_own_account(tmp_path: Path) -> None:
    rule = {"noise": "discrete_gaussian", "noise_multiplier": None, "epsilon": 4.0}
    checkpoint = trained(tmp_path / "run", fit(rule, epochs=1))
    (claim,) = privacy_claims(checkpoint)
    assert 3.9 <= claim.value <= 4.0
    assert claim.obtained["stages"][0]["event"]["noise"] == "discrete_gaussian"
    assert any("exact, on a grid" in condition for condition in claim.conditions)


def test_no_noise_is_no_claim(tmp_path: Path) -> None:
    assert privacy_claims(trained(tmp_path / "run", fit({"noise_multiplier": 0.0}))) == []


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_private_fit import SPLITS, fit, net
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages

path = Path(sys.argv[1])
folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, "recipe")
run_stages([("fit", fit(epochs=400, save_every=40))], net(), SPLITS, folder, seed=5, device=torch.device("cpu"))
"""


def test_a_killed_run_never_spends_more_than_planned_nor_forgets_what_it_spent(tmp_path: Path) -> None:
    run, here = tmp_path / "run", str(Path(__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(run), here], env={**os.environ})
    state = run / "stages" / "00-fit.state"
    deadline = time.monotonic() + 60
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (spent,) = spendings()
    assert 40 <= spent.steps < 1600
    folder = RunFolder.open(run)
    stage = fit(epochs=400, save_every=40)
    checkpoint = run_stages([("fit", stage)], net(), SPLITS, folder, seed=5, device=torch.device("cpu"))
    (after,) = spendings()
    assert after.steps == 1600
    (claim,) = privacy_claims(checkpoint)
    assert claim.value == account([(after.event, 1600)], 1e-3).epsilon


@pytest.mark.parametrize(("epsilon", "written"), [(2.9981, "3"), (0.12345, "0.124"), (11.01, "11.1"), (2.0, "2")])
def test_an_epsilon_is_rounded_up(epsilon: float, written: str) -> None:
    assert rounded_up(epsilon) == written
