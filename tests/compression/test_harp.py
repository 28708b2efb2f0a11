"""HARP: the gradient by the rates, the pressure on the size, and the budget that is met in the end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import assert_a_kill_changes_nothing, run_on
from torch import nn

from trivet.claims import PrivacyClaim
from trivet.compression.compression import Moment, originals, steps_on
from trivet.compression.harp import Harp
from trivet.compression.hydra import Hydra
from trivet.compression.structured import Structured
from trivet.errors import BadValue
from trivet.methods import build
from trivet.training.stage import Checkpoint

HARP = {"name": "harp", "density": 0.1, "start": 0.5, "gamma": 0.5}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))


WEIGHTS = 36 + 512 + 16


def stage(**settings: Any) -> Any:
    spec = {"name": "fit", "objective": "plain", "epochs": 3, "batch_size": 24, "optimizer": {"name": "sgd"}}
    return build("training", spec | settings)


def run(folder: Path, *stages: Any) -> Checkpoint:
    return run_on(net(), folder, *stages)


def prepared(harp: Hydra, seed: int = 0) -> tuple[nn.Sequential, list[Any]]:
    model = net(seed)
    harp.attach(model)
    harp.begin(model)
    harp.initialise(model)
    return model, list(harp.maps(model).values())


def test_with_the_start_at_the_density_the_first_masks_are_those_of_hydra() -> None:
    ours, theirs = prepared(Harp(density=0.25, start=0.25))[0], prepared(Hydra(density=0.25))[0]
    for number in (0, 3, 4):
        assert torch.equal(ours[number].weight, theirs[number].weight)


def test_the_gradient_by_a_rate_is_that_of_the_share_as_if_all_of_the_mask_moved_with_it() -> None:
    model, maps = prepared(Harp(density=0.1, start=0.4))
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 2
    nn.functional.cross_entropy(model(x), y).backward()
    layer, rated = model[3], maps[1]
    effective = layer.weight.detach().requires_grad_()
    features = model[:3](x)
    nn.functional.cross_entropy(model[4](features @ effective.T + layer.bias), y).backward()
    (weight, *_) = originals(layer)
    slope = 0.99 * rated.rate.sigmoid() * (1 - rated.rate.sigmoid())
    torch.testing.assert_close(rated.rate.grad, (effective.grad * weight).sum() * slope)
    torch.testing.assert_close(rated.scores.grad, effective.grad * weight * rated.scores.sign())
    assert float(rated.share(rated.rate.detach())) == pytest.approx(0.4)
    assert float(rated.share(torch.tensor(-100.0))) == pytest.approx(0.01)


def test_the_penalty_is_the_excess_over_the_budget_and_nothing_below_it() -> None:
    harp = Harp(density=0.1, start=0.4, gamma=0.7)
    model, maps = prepared(harp)
    harp.before(model, Moment(0, 10, 5))
    harp.adjust(model, Moment(0, 10, 5))
    for each, count in zip(maps, (36, 512, 16), strict=True):
        slope = 0.99 * each.rate.sigmoid() * (1 - each.rate.sigmoid())
        torch.testing.assert_close(each.rate.grad, 0.7 * count / WEIGHTS / 0.1 * slope)
        each.rate.grad = None
        with torch.no_grad():
            each.rate.fill_(-5.0)
    harp.adjust(model, Moment(0, 10, 5))
    assert all(float(each.rate.grad) == 0 for each in maps)


def test_the_pressure_grows_by_the_epoch_until_one_ends_within_the_budget() -> None:
    harp = Harp(density=0.1, start=0.4, gamma=0.5)
    model, maps = prepared(harp)
    pressures = []
    for step in range(12):
        if step == 5:
            with torch.no_grad():
                for each in maps:
                    each.rate.fill_(-5.0)
        if step == 9:
            with torch.no_grad():
                for each in maps:
                    each.rate.fill_(5.0)
        harp.before(model, Moment(step, 12, 2))
        pressures.append(float(maps[0].pressure))
    assert pressures == [0.5, 0.5, 1.0, 1.0] + [1.5] * 8


@pytest.mark.parametrize("pattern", ["unstructured", {"name": "structured", "granularity": "kernel"}], ids=str)
def test_in_the_end_the_budget_is_met_and_layers_have_shares_of_their_own(pattern: Any, tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", stage(compression={**HARP, "pattern": pattern}), stage())
    record, model = checkpoint.history[0], checkpoint.model
    kept = {name: int((model.get_submodule(name).weight != 0).sum()) for name in ("0", "3", "4")}  # type: ignore[arg-type]
    assert record["kept"] == kept
    # Shares round up to whole units, of up to nine weights, in each layer.
    assert sum(kept.values()) <= 0.1 * WEIGHTS + (3 if pattern == "unstructured" else 11)
    assert len({round(count / size, 2) for count, size in zip(kept.values(), (36, 512, 16), strict=True)}) > 1
    assert record["harp_excess"] > 0


def test_rates_above_the_budget_are_lowered_together_no_more_than_need_be() -> None:
    harp = Harp(density=0.1, start=0.5, pattern=Structured("kernel"))
    model, maps = prepared(harp)
    with torch.no_grad():
        for number, each in enumerate(maps):
            each.rate.fill_(float(number))
    harp.end(model)
    shares = [float(each.share(each.rate.detach())) for each in maps]
    assert sum(n * k for n, k in zip((36, 512, 16), shares, strict=True)) == pytest.approx(0.1 * WEIGHTS, rel=1e-5)
    rates = [float(each.rate.detach()) for each in maps]
    assert [b - a for a, b in itertools.pairwise(rates)] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("step", [3, 4, 9])
def test_a_killed_run_resumes_to_the_same_bits(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (stage(compression=HARP, save_every=1),)
    assert_a_kill_changes_nothing(step, stages, net, tmp_path, monkeypatch)


@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_rates_learn_under_a_private_rule(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    rule = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0, "engine": engine}
    checkpoint = run(tmp_path / "run", stage(compression=HARP, rule=rule))
    assert len([claim for claim in checkpoint.ledger.holding if isinstance(claim, PrivacyClaim)]) == 1
    assert len(set(checkpoint.history[0]["kept"].values())) == 3


def test_rates_that_learn_are_those_of_this_compression_alone() -> None:
    model, _ = prepared(Harp(density=0.1))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{n}.parametrizations.weight.0.{what}" for n in (0, 3, 4) for what in ("scores", "rate")}
    assert all(not hasattr(steps_on(prepared(Hydra())[0][number])[0], "rate") for number in (0, 3, 4))


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(BadValue, match="gamma=-1 must be finite and not negative"):
        Harp(gamma=-1)
    with pytest.raises(BadValue, match=r"start=0 must lie in \(0, 1\]"):
        Harp(start=0)
    with pytest.raises(BadValue, match=r"density=2 must lie in \(0, 1\]"):
        Harp(density=2)
