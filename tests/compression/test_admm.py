"""ADMM: where it settles on problems solved on paper, what it leaves behind, and that a kill changes nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import assert_a_kill_changes_nothing, run_on
from torch import nn

from trivet.compression.admm import Admm
from trivet.compression.compression import Moment, originals, steps_on
from trivet.compression.masks import Mask, Masks
from trivet.compression.projection import Projection
from trivet.compression.sparse_projection import Sparse
from trivet.errors import BadValue
from trivet.methods import build
from trivet.training.stage import Checkpoint

ADMM = {"name": "admm", "projection": {"name": "sparse", "density": 0.25}, "rho": 0.05, "growth": 1.5}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def stage(**settings: Any) -> Any:
    spec = {"name": "fit", "objective": "plain", "epochs": 3, "batch_size": 24, "optimizer": {"name": "sgd"}}
    return build("training", spec | settings)


def run(folder: Path, *stages: Any) -> Checkpoint:
    return run_on(net(), folder, *stages)


def settle(target: torch.Tensor, rho: float, keep: int, updates: int = 60) -> tuple[Any, nn.Module]:
    """ADMM on f = || W - target ||^2 / 2, where one gradient step of the right length solves each subproblem."""
    model = nn.Sequential(nn.Linear(len(target), 1, bias=False, dtype=torch.float64))
    admm = Admm(projection=Sparse(keep / len(target)), rho=rho, growth=1.0)
    admm.attach(model)
    (stored,) = originals(model[0])
    with torch.no_grad():
        stored.copy_(target[None])
    admm.begin(model)
    admm.initialise(model)
    for step in range(updates):
        moment = Moment(step, updates, 1)
        admm.before(model, moment)
        stored.grad = stored.detach() - target
        admm.adjust(model, moment)
        with torch.no_grad():
            stored -= stored.grad / (1 + rho)
    (split,) = steps_on(model[0])
    return split, model


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_on_a_quadratic_it_settles_on_the_largest_weights_with_the_dual_of_the_rest(rho: float) -> None:
    target = torch.tensor([3.0, -0.5, 1.0, -2.0, 0.2, 0.7], dtype=torch.float64)
    split, model = settle(target, rho, keep=2)
    kept = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(split.z[0], target * kept)
    torch.testing.assert_close(model[0].weight[0].detach(), target * kept)
    torch.testing.assert_close(split.u[0], target * (1 - kept) / rho)
    assert split.gap(model[0].weight.detach()) < 1e-9


def test_with_too_small_a_penalty_it_does_not_settle_and_says_so() -> None:
    target = torch.tensor([3.0, -2.9, 2.8, -2.7, 2.6, 2.5], dtype=torch.float64)
    split, model = settle(target, 0.1, keep=2)
    assert split.gap(model[0].weight.detach()) > 0.1
    report = Admm(projection=Sparse(1 / 3)).report(model)
    assert report["admm_gap"] == pytest.approx(split.gap(model[0].weight.detach()))
    assert "ADMM has not converged: the weights of 0 differ" in report["warning"]


def test_the_penalty_gradient_is_that_of_the_penalty_through_earlier_masks() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
    mask = Masks()
    mask.attach(model)
    mask.initialise(model)
    admm = Admm(projection=Sparse(0.25), rho=0.7)
    admm.attach(model)
    admm.initialise(model)
    split = steps_on(model[3])[-1]
    (stored,) = originals(model[3])
    with torch.no_grad():
        stored.add_(torch.randn_like(stored))
        split.u.copy_(torch.randn_like(split.u))
    stored.grad = torch.ones_like(stored)
    admm.adjust(model, Moment(0, 1, 1))
    free = stored.detach().clone().requires_grad_()
    (0.7 / 2 * (free * (model[3].weight != 0) - split.z + split.u).square().sum()).backward()
    torch.testing.assert_close(stored.grad, 1 + free.grad)
    assert bool((stored.grad[:, ::2] == 1).all())


def test_rho_grows_and_copies_move_only_when_a_period_is_over() -> None:
    model = net()
    admm = Admm(projection=Sparse(0.25), rho=0.1, growth=2.0, period=2)
    admm.attach(model)
    admm.initialise(model)
    split = steps_on(model[3])[-1]
    rhos, copies = [], []
    for step in range(10):
        with torch.no_grad():
            originals(model[3])[0].add_(torch.randn(2, 64))
        admm.before(model, Moment(step, 10, 2))
        rhos.append(round(float(split.rho), 4))
        copies.append(split.z.clone())
    assert rhos == [0.1] * 4 + [0.2] * 4 + [0.4] * 2
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(copies)]
    assert [number + 1 for number, each in enumerate(moved) if each] == [4, 8]


def test_it_trains_then_prunes_then_later_stages_train_what_is_left(tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", stage(compression=ADMM, holdout=16), stage())
    model: Any = checkpoint.model
    assert int((model[3].weight == 0).sum()) == 96
    assert int((model[0].weight == 0).sum()) == 27
    assert checkpoint.structure == []
    record = checkpoint.history[0]
    assert record["admm_gap"] > 0
    assert ("warning" in record) == (record["admm_gap"] > 0.1)


def test_held_out_records_judge_the_projected_weights() -> None:
    model = net()
    admm = Admm(projection=Sparse(0.25))
    admm.attach(model)
    admm.initialise(model)
    x, free = torch.rand(5, 1, 4, 4), net()
    assert torch.equal(model(x), free(x))
    with admm.as_shipped(model):
        shipped = model(x)
        assert int((model[3].weight == 0).sum()) == 96
    assert torch.equal(model(x), free(x))
    admm.end(model)
    assert torch.equal(model(x), shipped)
    assert isinstance(steps_on(model[3])[-1], Mask)


def test_if_everything_is_allowed_it_is_plain_training(tmp_path: Path) -> None:
    everything = {"name": "admm", "projection": {"name": "sparse", "density": 1.0}, "rho": 0.5}
    still = {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}
    model: Any = run(tmp_path / "run", stage(compression=everything, optimizer=still)).model
    assert torch.equal(model[3].weight, net()[3].weight)


def test_weights_masked_earlier_stay_zero(tmp_path: Path) -> None:
    hydra = {"name": "hydra", "density": 0.5}
    levels: Any = stage(compression=ADMM)
    object.__setattr__(levels.compression, "projection", Signs())
    first = run(tmp_path / "first", stage(compression=hydra)).model
    model: Any = run(tmp_path / "run", stage(compression=hydra), levels, stage()).model
    assert torch.equal(model[3].weight == 0, first[3].weight == 0)  # type: ignore[index]


@dataclass(frozen=True)
class Signs(Projection):
    def project(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.sign() * 0.1


@pytest.mark.parametrize("step", [3, 4, 9])
def test_a_killed_run_resumes_to_the_same_bits(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (stage(compression=ADMM, save_every=1),)
    assert_a_kill_changes_nothing(step, stages, net, tmp_path, monkeypatch)


def test_the_sparse_projection_is_the_nearest_sparse_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    for keep in (1, 2, 3):
        weight = torch.randn(1, 6, generator=generator)
        ours = Sparse(keep / 6).project(weight)
        distances = [
            float((weight - weight * torch.zeros(6).index_fill(0, torch.tensor(chosen), 1.0)).square().sum())
            for chosen in itertools.combinations(range(6), keep)
        ]
        assert float((weight - ours).square().sum()) == pytest.approx(min(distances))
        assert torch.equal(Sparse(keep / 6).project(ours), ours)
    tiny = torch.tensor([[1e-30, 3e-30, 2e-30]])
    assert torch.equal(Sparse(1 / 3).project(tiny), tiny * torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize(("setting", "value"), [("rho", 0.0), ("growth", 0.9), ("period", 0)])
def test_settings_without_sense_are_refused(setting: str, value: float) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(BadValue, match=f"{setting}={value} must be"):
        Admm(projection=Sparse(0.5), **settings)
