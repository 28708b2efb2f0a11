"""HYDRA: its scores, its straight-through gradient, its phases, and the baseline it contains."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from short_runs import assert_a_kill_changes_nothing, run_on
from torch import nn

from trivet.claims import PrivacyClaim
from trivet.compression.compression import originals, steps_on
from trivet.compression.hydra import Hydra
from trivet.compression.masks import Mask
from trivet.methods import build
from trivet.privacy.budget import spendings
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into
from trivet.training.stage import Checkpoint

THREAT = build("threats", {"name": "linf", "eps": 0.05})
HYDRA = {"name": "hydra", "density": 0.25}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def stage(objective: Any = "plain", **settings: Any) -> Any:
    spec = {"name": "fit", "objective": objective, "epochs": 2, "batch_size": 24, "optimizer": {"name": "sgd"}}
    return build("training", spec | settings, threat=THREAT)


def run(folder: Path, *stages: Any) -> Checkpoint:
    return run_on(net(), folder, *stages)


def prepared(density: float, seed: int = 0) -> nn.Sequential:
    model = net(seed)
    hydra = Hydra(density=density)
    hydra.attach(model)
    hydra.begin(model)
    hydra.initialise(model)
    return model


@pytest.mark.parametrize("density", [0.03, 0.25, 0.9])
def test_the_first_mask_is_that_of_the_largest_weights_of_each_layer(density: float) -> None:
    for number in (0, 4):
        weight = net()[number].weight
        keep = weight.numel() - int((1 - density) * weight.numel() + 1e-9)
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[weight.abs().flatten().topk(keep).indices] = True
        (scored,) = steps_on(prepared(density)[number])
        assert torch.equal(scored.mask.flatten(), expected)
        assert float(scored.scores.detach().abs().max()) == pytest.approx((6 / weight[0].numel()) ** 0.5)


def test_keeping_everything_changes_nothing() -> None:
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(prepared(1.0)(x), net()(x))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_the_gradient_by_the_scores_passes_the_mask_as_if_it_were_their_size(seed: int, density: float) -> None:
    model = prepared(density, seed)
    layer = model[4]
    (scored,) = steps_on(layer)
    with torch.no_grad():
        scored.scores.copy_(torch.randn_like(scored.scores))
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 2
    nn.functional.cross_entropy(model(x), y).backward()
    effective = layer.weight.detach().requires_grad_()
    features = model[:4](x)
    nn.functional.cross_entropy(features @ effective.T + layer.bias, y).backward()
    (weight,) = originals(layer)
    torch.testing.assert_close(scored.scores.grad, effective.grad * weight * scored.scores.sign())
    assert weight.grad is None


def test_of_two_weights_the_one_that_serves_the_loss_is_kept() -> None:
    """Brute force over both masks: the magnitudes prefer the first weight, the loss the second."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.9]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    target = 0.9 * x[:, 1:]
    losses = [
        float(((x * torch.tensor(m)) @ torch.tensor([[1.0], [0.9]]) - target).square().sum())
        for m in itertools.permutations([1.0, 0.0])
    ]
    assert losses[1] < losses[0]
    hydra = Hydra(density=0.5)
    hydra.attach(model)
    hydra.begin(model)
    hydra.initialise(model)
    (scored,) = steps_on(model[0])
    assert scored.mask.tolist() == [[True, False]]
    optimizer = torch.optim.SGD([scored.scores], lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
    hydra.end(model)
    (mask,) = steps_on(model[0])
    assert isinstance(mask, Mask)
    assert mask.mask.tolist() == [[False, True]]


def test_three_stages_train_then_choose_then_fine_tune(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    class Spy(Hydra):
        def initialise(self, model: nn.Module) -> None:
            super().initialise(model)
            found["weights"] = [tensor.clone() for layer in (model[0], model[4]) for tensor in originals(layer)]
            found["first"] = [steps_on(layer)[0].mask for layer in (model[0], model[4])]

        def end(self, model: nn.Module) -> Any:
            for before, layer in zip(found["weights"], (model[0], model[4]), strict=True):
                assert torch.equal(originals(layer)[0], before)
            found["chosen"] = [steps_on(layer)[0].mask for layer in (model[0], model[4])]
            return super().end(model)

    stages = [stage("pgd_at"), stage("pgd_at", compression=None, epochs=4, optimizer={"name": "sgd", "lr": 0.5})]
    object.__setattr__(stages[1], "compression", Spy(density=0.25))
    checkpoint = run(tmp_path / "run", *stages, stage("pgd_at"))
    model: Any = checkpoint.model
    for layer, chosen in zip((model[0], model[4]), found["chosen"], strict=True):
        assert torch.equal(layer.weight != 0, chosen)
    assert any(not torch.equal(a, b) for a, b in zip(found["first"], found["chosen"], strict=True))
    assert any(
        not torch.equal(a * m, w.weight)
        for a, m, w in zip(found["weights"], found["chosen"], (model[0], model[4]), strict=True)
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_with_a_rate_of_zero_it_is_pruning_by_magnitude(tmp_path: Path) -> None:
    still = {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}
    model: Any = run(tmp_path / "run", stage(compression=HYDRA, optimizer=still)).model
    fresh: Any = prepared(0.25)
    assert torch.equal(model[4].weight, fresh[4].weight)
    assert int((model[4].weight == 0).sum()) == 96


def test_a_run_reads_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", stage(compression=HYDRA), stage())
    again = net(8)
    metadata = load_into(again, tmp_path / "run" / "weights.safetensors")
    x = torch.rand(5, 1, 4, 4)
    assert all(torch.equal(tensor, checkpoint.model.state_dict()[key]) for key, tensor in again.state_dict().items())
    torch.testing.assert_close(again(x), checkpoint.model(x))  # memory may be laid out another way
    assert metadata["structure"] == checkpoint.structure == []
    assert not any("scores" in name or "mask" in name for name in again.state_dict())


@pytest.mark.parametrize("step", [3, 6, 9, 14, 22])
def test_a_killed_run_resumes_to_the_same_bits(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (stage(save_every=2), stage(compression=HYDRA, save_every=2), stage(save_every=2))
    assert_a_kill_changes_nothing(step, stages, net, tmp_path, monkeypatch)


@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_under_a_private_rule_the_budgets_of_all_three_stages_compose(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    rule = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0, "engine": engine}
    private = run(tmp_path / "run", stage(rule=rule), stage(compression=HYDRA, rule=rule), stage(rule=rule))
    alone = run(tmp_path / "alone", stage(rule=rule))
    epsilons = [
        [claim.value for claim in each.ledger.holding if isinstance(claim, PrivacyClaim)] for each in (private, alone)
    ]
    assert len(epsilons[0]) == len(epsilons[1]) == 1
    assert epsilons[0][0] > epsilons[1][0]
    (claim,) = (claim for claim in private.ledger.holding if isinstance(claim, PrivacyClaim))
    assert claim.artefact == private.artefact
    assert float((private.model[4].weight == 0).float().mean()) == 0.75


def test_every_private_stage_takes_all_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    rule = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
    stages = [stage(rule=rule, epochs=3), stage(compression=HYDRA, rule=rule, epochs=1), stage(rule=rule, epochs=2)]
    history = run(tmp_path / "run", *stages).history
    logged = [(line["stage"], line["step"]) for line in RunFolder.open(tmp_path / "run").read_log()]
    assert {(number, each["steps"] - 1) for number, each in enumerate(history)} <= set(logged)
    assert [each["privacy"]["steps"] for each in history] == [each["steps"] for each in history] == [12, 4, 8]
    assert sum(each.steps for each in spendings()) == 24


def test_scores_learnt_without_a_private_rule_end_the_privacy_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    rule = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
    checkpoint = run(tmp_path / "run", stage(rule=rule), stage(compression=HYDRA))
    (claim,) = (claim for claim in checkpoint.ledger.claims if isinstance(claim, PrivacyClaim))
    assert not claim.holds
