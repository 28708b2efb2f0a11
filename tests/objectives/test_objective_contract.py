"""What holds for every registered objective, whatever it minimises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from trivet.data.dataset import Batch, Dataset
from trivet.methods import build, methods, spec_of
from trivet.objectives.objective import Objective, Progress
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf

EPS = 0.1
SETTINGS: dict[str, dict[str, Any]] = {
    "awp": {"objective": {"name": "trades", "steps": 3}},
    "gaussian": {"sigma": 0.25, "samples": 2},
    "stability": {"sigma": 0.25},
    "smooth_adv": {"sigma": 0.25, "samples": 2, "steps": 2},
    "ladder": {"natural": 0.0, "svm": "linear", "min_accuracy": 0.0, "eps": 5.0},
    "macer": {"sigma": 0.25, "samples": 4, "defer": 0.0},
    "consistency": {"sigma": 0.25},
    "cat_rs": {"sigma": 0.25, "samples": 2, "steps": 2},
    "dp_cert": {"sigma": 0.25},
    "mistake_severity": {"hierarchy": {"name": "hierarchy", "classes": list("abcd"), "tree": [["a", "b"], "c", "d"]}},
    "soft_labels": {"hierarchy": {"name": "hierarchy", "classes": list("abcd"), "tree": [["a", "b"], "c", "d"]}},
    "augmentation_multiplicity": {
        "augment": [{"name": "random_crop", "padding": 1}],
        "objective": {"name": "trades", "steps": 2},
        "copies": 2,
    },
}
NAMES = [found.name for found in methods("objectives")]
INSIDE_THREAT = ["alp", "awp", "fast_at", "free_at", "mart", "mistake_severity", "pgd_at", "trades"]


def made(name: str, **settings: Any) -> Objective:
    return build("objectives", {"name": name, **SETTINGS.get(name, {}), **settings}, threat=Linf(EPS))


def backward(objective: Objective, model: nn.Module, batch: Batch, progress: Progress) -> torch.Tensor:
    """One training step without the optimizer: what the loop does, and lets stateful objectives move on."""
    model.zero_grad()
    per_example = objective(model, batch, progress).per_example
    per_example.mean().backward()
    return per_example.detach()


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_one_per_record_and_reach_every_parameter(name, convnet, batch, progress) -> None:
    losses = backward(made(name), convnet, batch, progress)
    assert losses.shape == (8,)
    assert losses.isfinite().all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in convnet[4].parameters())
    assert all(parameter.grad is not None for parameter in convnet.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_weights_modes_and_gradient_flags_as_they_were(name, convnet, batch, progress) -> None:
    convnet[1].eval()  # a frozen BatchNorm must stay frozen
    before = copy.deepcopy(convnet)
    held = dict(convnet.named_parameters())
    backward(made(name), convnet, batch, progress)
    for key, parameter in convnet.named_parameters():
        assert parameter is held[key]
        assert torch.equal(parameter, before.get_parameter(key))
        assert parameter.requires_grad
    assert [module.training for module in convnet.modules()] == [module.training for module in before.modules()]


class _Mask(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_network_trains_step_after_step_and_its_pruned_weights_get_no_gradient(
    name, convnet, batch, progress
) -> None:
    mask = (torch.rand_like(convnet[4].weight) > 0.5).float()
    parametrize.register_parametrization(convnet[4], "weight", _Mask(mask))
    for _ in range(2):
        losses = backward(made(name), convnet, batch, progress)
        assert losses.isfinite().all()
    gradient = convnet[4].parametrizations.weight.original.grad
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[mask == 1] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_moment_of_training_gives_the_same_losses(name, mlp, batch, progress) -> None:
    first, again = (made(name)(mlp, batch, progress).per_example for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "mart", "alp", "fast_at", "gaussian"])
def test_another_step_or_seed_draws_another_start(name, mlp, batch) -> None:
    objective = made(name) if name == "gaussian" else made(name, step_size=0.0)  # stay at the start
    here = objective.perturb(mlp, batch, Progress(3, 10, 0.3, seed=7))
    later = objective.perturb(mlp, batch, Progress(4, 10, 0.4, seed=7))
    elsewhere = objective.perturb(mlp, batch, Progress(3, 10, 0.3, seed=8))
    assert not torch.equal(here, later)
    assert not torch.equal(here, elsewhere)


@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.5)], ids=["Linf", "L2"])
@pytest.mark.parametrize("name", INSIDE_THREAT)
def test_perturbed_inputs_lie_in_the_threat_set_and_carry_no_graph(name, threat, convnet, batch, progress) -> None:
    settings = {"objective": {"name": "trades", "threat": threat}} if name == "awp" else {"threat": threat}
    objective = made(name, **settings)
    for _ in range(3):  # free adversarial training moves only after a step
        perturbed = objective.perturb(convnet, batch, progress)
        assert threat.contains(perturbed, batch.inputs).all()
        assert not perturbed.requires_grad
        backward(objective, convnet, batch, progress)
    size = torch.linalg.vector_norm(
        (perturbed - batch.inputs).flatten(1), ord=float("inf") if threat.norm == "Linf" else 2.0, dim=1
    )
    assert (size > threat.eps / 2).all()


@pytest.mark.parametrize("name", ["alp", "fast_at", "mart", "pgd_at", "trades"])
def test_the_inner_search_raises_the_loss_of_a_trained_net_well_above_random_points(name, batch, progress) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        made("plain")(net, batch, progress).per_example.mean().backward()
        optimizer.step()
    objective, plain = made(name), made("plain")
    found, clean, random = (
        plain.losses(net, batch, points, progress).per_example.mean()
        for points in (
            objective.perturb(net, batch, progress),
            batch.inputs,
            Linf(EPS).random_start(batch.inputs, progress.generator("test")),
        )
    )
    assert found > 2 * clean
    assert found > 1.5 * random


def isolated(objective: Objective, model: nn.Module, batch: Batch, progress: Progress) -> bool:
    """Whether no record's loss moves when the last record is replaced by one that attracts large gradients."""
    before = objective(model, batch, progress).per_example
    inputs, labels = batch.inputs.clone(), batch.labels.clone()
    inputs[-1], labels[-1] = 1.0 - inputs[-1], (labels[-1] + 1) % 4
    after = objective(model, Batch(inputs, labels, batch.index), progress).per_example
    assert not torch.allclose(before[-1], after[-1])
    return torch.allclose(before[:-1], after[:-1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if made(name).record_isolated])
def test_record_isolated_objectives_price_a_record_without_looking_at_the_others(name, mlp, batch, progress) -> None:
    assert isolated(made(name), mlp, batch, progress)


def test_the_isolation_test_sees_the_coupling_of_weight_perturbation(mlp, batch, progress) -> None:
    assert not made("awp").record_isolated
    assert not isolated(made("awp"), mlp, batch, progress)


def test_free_training_carries_records_into_each_other_so_it_does_not_claim_isolation(mlp, batch, progress) -> None:
    objective, losses = made("free_at"), []
    for inputs in (batch.inputs, 1.0 - batch.inputs):
        objective.load_state({})
        backward(objective, mlp, Batch(inputs, batch.labels, batch.index), progress)
        losses.append(objective(mlp, batch, progress).per_example)
    assert not objective.record_isolated
    assert not torch.allclose(*losses)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_steps_work_and_stay_near_fp32(name, convnet, batch) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        progress = Progress(3, 10, 1.5, seed=7, precision=precision)
        model = copy.deepcopy(convnet)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            per_example = made(name)(model, batch, progress).per_example.float()
        per_example.mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        losses[precision] = float(per_example.detach().mean())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_of_an_objective_builds_an_equal_one(name) -> None:
    assert build("objectives", spec_of(made(name))) == made(name)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pgd_at", {"steps": 0}),
        ("pgd_at", {"eps_ramp": 1.0}),
        ("pgd_at", {"step_size": -0.1}),
        ("trades", {"beta": -1.0}),
        ("trades", {"steps": 0}),
        ("mart", {"beta": -1.0}),
        ("alp", {"lam": -1.0}),
        ("awp", {"gamma": -0.1}),
        ("awp", {"warmup_epochs": -1.0}),
        ("free_at", {"replays": 0}),
        ("fast_at", {"attack_mode": "both"}),
        ("fast_at", {"steps": 2}),
        ("gaussian", {"sigma": -1.0}),
        ("gaussian", {"samples": 0}),
    ],
)
def test_wrong_settings_are_refused_by_name(name, wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        made(name, **wrong)


def test_the_radius_ramp_scales_radius_and_step(mlp, batch) -> None:
    objective = made("pgd_at", eps_ramp=0.5)
    reach = [
        float((objective.perturb(mlp, batch, Progress(step, 100, 0.0, 0)) - batch.inputs).abs().max())
        for step in (0, 10, 25, 50, 99)
    ]
    assert reach == pytest.approx([0.0, 0.2 * EPS, 0.5 * EPS, EPS, EPS], rel=1e-3)


def test_weight_perturbation_passes_on_what_its_objective_asks_of_held_out_records(mlp, batch, progress) -> None:
    objective = made("awp", objective={"name": "single_prop", "weight": "adaptive"})
    assert objective.needs_holdout
    assert not made("awp").needs_holdout
    held = Dataset(batch.inputs, batch.labels, tuple("abcd"), "held", scale=1.0)
    assert "kappa" in objective.judge(mlp.eval(), held, progress)
    assert "kappa" in objective.state()
