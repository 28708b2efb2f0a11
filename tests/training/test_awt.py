"""Adversarial winning tickets: the loss at its ends, what it drops and keeps, and what it does to a privacy claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivet.claims import PrivacyClaim, Verdict
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, TrivetError
from trivet.methods import build
from trivet.models.mlp import mlp
from trivet.models.tangent_kernel import linearize, tangent_kernel
from trivet.training.awt import Awt, _Transfer
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages
from trivet.training.stage import Checkpoint, Context

THREAT = build("threats", {"name": "linf", "eps": 0.1})
RULE = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
LAYERS = {"fc1": (16, 12), "fc2": (12, 10), "logits": (10, 2)}


def blobs(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :2] += 120
    images[labels == 1, :, 2:] += 120
    return Dataset(images, labels, ("top", "bottom"), "blobs")


SPLITS = Splits(blobs(96, 0), blobs(40, 1))


def net(seed: int = 0) -> nn.Sequential:
    return mlp((1, 4, 4), 2, [12, 10], generator=torch.Generator().manual_seed(seed))


def awt(objective: Any = "pgd_at", **settings: Any) -> Awt:
    spec = {"name": "awt", "objective": objective, "steps": 6, "refresh": 2, "batch_size": 8, "density": 0.25}
    made: Awt = build("training", spec | settings, threat=THREAT)
    return made


def fit(**settings: Any) -> tuple[str, Any]:
    spec = {"name": "fit", "objective": "pgd_at", "epochs": 1, "batch_size": 24, "optimizer": {"name": "sgd"}}
    return "fit", build("training", spec | settings, threat=THREAT)


def run(folder: Path, *stages: Any, model: nn.Module | None = None) -> Checkpoint:
    made = RunFolder.create(folder, "recipe")
    named = [("awt", each) if isinstance(each, Awt) else each for each in stages]
    return run_stages(named, model or net(), SPLITS, made, seed=3, device=torch.device("cpu"))


def weight(model: nn.Module, name: str) -> Tensor:
    found: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
    return found


def test_with_every_weight_kept_both_distances_and_the_gradient_are_zero(tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", awt(density=1.0, l2=0.0, steps=2, refresh=1))
    for line in checkpoint.history[0]["curve"]:
        assert line["target_distance"] == line["kernel_distance"] == 0
    for name, value in net().state_dict().items():  # Adam divides by the size of the gradient: it must be exactly zero
        assert torch.equal(value, checkpoint.model.state_dict()[name])


def test_at_radius_zero_it_is_ntt_between_a_batch_and_itself(tmp_path: Path) -> None:
    still = {"name": "pgd_at", "steps": 2, "threat": {"name": "linf", "eps": 0.0}}
    ours, ntt = (run(tmp_path / name, awt(each)).model for name, each in (("awt", still), ("ntt", "plain")))
    far = run(tmp_path / "far", awt("pgd_at")).model
    for name in LAYERS:
        assert torch.equal(weight(ours, name), weight(ntt, name))
        assert not torch.equal(weight(ours, name), weight(far, name))


def test_the_loss_is_what_its_formula_says(tmp_path: Path) -> None:
    """Against kernels formed by hand from the masked weights, for a batch attacked on the dense network."""
    stage = awt(gamma=0.7, l2=0.3, batch_size=96)
    made = _Transfer(stage, net(), tuple(LAYERS), _context(tmp_path))
    seen: list[Tensor] = []
    perturbed = made.perturbed
    made.perturbed = lambda batch, step: seen.append(batch.inputs) or seen.append(perturbed(batch, step)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    loss = made._loss(1)
    x, attacked = seen
    assert float((x - attacked).abs().max()) == pytest.approx(0.1, rel=1e-4)
    dense, sparse = net(), net()
    masks = {}
    for name, (ins, outs) in LAYERS.items():
        full = weight(dense, name)
        masks[f"{name}.weight"] = full.abs() >= full.abs().flatten().topk(ins * outs // 4).values[-1]
        weight(sparse, name).data.mul_(masks[f"{name}.weight"])
    kernels = [
        tangent_kernel(linearize(model, x), linearize(model, attacked), chosen)
        for model, chosen in ((sparse, masks), (dense, {}))
    ]
    expected = (sparse(attacked) - dense(attacked)).square().mean() + 0.7 * (kernels[0] - kernels[1]).square().mean()
    expected = expected + 0.3 / 0.25 * sum(weight(sparse, name).square().sum() for name in LAYERS)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def _context(folder: Path) -> Context:
    return Context(SPLITS, 3, RunFolder.create(folder / "run", "recipe").stage(0, "awt"))


@pytest.mark.parametrize("kernel", ["masked", "unmasked"])
def test_the_kernel_term_reaches_the_kept_weights_and_no_others(kernel: Any, tmp_path: Path) -> None:
    both, without = (
        _Transfer(awt(gamma=gamma, kernel=kernel), net(), tuple(LAYERS), _context(tmp_path / str(gamma)))
        for gamma in (1.0, 0.0)
    )
    for made in (both, without):
        made._loss(1).backward()
    for name in LAYERS:
        key = f"{name}.weight"
        of_kernel = both.theta[key].grad - without.theta[key].grad  # type: ignore[operator]
        assert float(of_kernel.abs().max()) > 1e-6
        assert bool((both.theta[key].grad[~both.masks[key]] == 0).all())  # type: ignore[index]


def test_the_two_kernels_differ_once_weights_are_dropped(tmp_path: Path) -> None:
    losses = [
        float(_Transfer(awt(kernel=kernel), net(), tuple(LAYERS), _context(tmp_path / kernel))._loss(1).detach())
        for kernel in ("masked", "unmasked")
    ]
    assert losses[0] != pytest.approx(losses[1])


def test_each_layer_keeps_its_share_and_dropped_weights_stay_dropped_in_training(tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", awt(density=0.1), fit())
    record = checkpoint.history[0]
    assert record["kept"] == {"fc1": 20, "fc2": 12, "logits": 2}
    assert record["density"] == pytest.approx(34 / 332)
    again = net(9)
    metadata = load_into(again, tmp_path / "run" / "stages" / "00-awt.safetensors")
    assert metadata["structure"] == [{"name": "masks", "include": list(LAYERS), "exclude": []}]
    for name, kept in record["kept"].items():
        assert int((weight(checkpoint.model, name) != 0).sum()) == kept
        assert torch.equal(weight(again, name) == 0, weight(checkpoint.model, name) == 0)
    assert checkpoint.structure == []


def test_the_distances_fall_and_weights_come_back(tmp_path: Path) -> None:
    checkpoint = run(tmp_path / "run", awt(steps=60, refresh=10, lr=0.02, l2=0.0, gamma=0.01))
    record = checkpoint.history[0]
    first, last = record["curve"][0], record["curve"][-1]
    assert [line["step"] for line in record["curve"]] == list(range(0, 61, 10))
    assert last["target_distance"] < 0.3 * first["target_distance"]
    assert last["kernel_distance"] < 0.7 * first["kernel_distance"]
    assert record["came_back"] > 0


def test_the_mask_is_not_chosen_again_near_the_end(tmp_path: Path) -> None:
    """After the last choice the weights it kept must still be trained: none in the last `refresh` steps, or at them."""
    made = _Transfer(awt(steps=6, refresh=2), net(), tuple(LAYERS), _context(tmp_path))
    choices: list[int] = []
    choose = made._choose
    made._choose = lambda: choices.append(0) or choose()  # type: ignore[method-assign, func-returns-value]
    made.run()
    assert len(choices) == 1  # at step 2; not at 4 or 6


def test_the_kernel_distance_is_measured_on_the_masked_kernel(tmp_path: Path) -> None:
    curves = [run(tmp_path / k, awt(steps=0, kernel=k)).history[0]["curve"] for k in ("masked", "unmasked")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 1


def test_a_student_under_attack_is_another_network(tmp_path: Path) -> None:
    dense, student = (run(tmp_path / who, awt(attacked=who)).model for who in ("dense", "student"))
    assert not torch.equal(weight(dense, "fc1"), weight(student, "fc1"))


def test_the_attack_of_trades_needs_no_labels(tmp_path: Path) -> None:
    other = Splits(Dataset(SPLITS.train.images, 1 - SPLITS.train.labels, SPLITS.train.classes, "blobs"), SPLITS.test)
    found = []
    for splits in (SPLITS, other):
        made = _Transfer(
            awt("trades"), net(), tuple(LAYERS), Context(splits, 3, _context(tmp_path / str(len(found))).files)
        )
        found.append(made._loss(1).detach())
    assert torch.equal(found[0], found[1])


def test_sketches_train_and_have_no_bound(tmp_path: Path) -> None:
    record = run(tmp_path / "run", awt(sketches=1, steps=4)).history[0]
    assert record["lazy_regime_bound"] is None
    assert all(line["kernel_distance"] > 0 for line in record["curve"])


def test_convolutions_and_norms_take_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = run(tmp_path / "run", awt(steps=3), model=model)
    assert made.history[0]["kept"] == {"0": 9, "4": 32}
    assert not torch.equal(made.model.state_dict()["1.weight"], before["1.weight"])


def test_the_bound_is_void_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path / "run", awt()).history[0]["lazy_regime_bound"]
    assert found["standing"].startswith("VOID: ")
    assert "made anew at each step" in found["standing"]
    assert f"awt: lazy-regime bound {found['standing']}." in capsys.readouterr().err
    clean = run(tmp_path / "clean", awt("plain")).history[0]["lazy_regime_bound"]
    assert "made anew" not in clean["standing"]
    assert "not known" in clean["standing"]


def test_it_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    a, b = (run(tmp_path / name, awt(), fit()).model for name in ("a", "b"))
    assert all(torch.equal(weight(a, name), weight(b, name)) for name in LAYERS)


def test_a_claim_of_privacy_ends_here_and_none_can_be_made_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    for name, stages in (
        ("after", (fit(rule=RULE, objective="plain"), awt(steps=1))),
        ("before", (awt(steps=1), fit(rule=RULE, objective="plain"))),
    ):
        checkpoint = run(tmp_path / name, *stages)
        assert not [claim for claim in checkpoint.ledger.holding if isinstance(claim, PrivacyClaim)]
    assert awt().effect().privacy[0] is Verdict.VOID


def test_what_it_cannot_start_from_is_refused(tmp_path: Path) -> None:
    prune = "prune", build("training", {"name": "prune", "pruner": "magnitude"})
    with pytest.raises(TrivetError, match="starts from plain weights, and an earlier stage has put masks on them"):
        run(tmp_path / "run", prune, awt())
    frozen = net()
    frozen.fc2.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(BadValue, match=r"fc2\.weight is no tensor that learns by itself"):
        run(tmp_path / "frozen", awt(), model=frozen)
    with pytest.raises(BadValue, match="makes several views of a record"):
        run(tmp_path / "views", awt({"name": "gaussian", "sigma": 0.1, "samples": 2}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("density", 0.0), ("steps", -1), ("batch_size", 0), ("gamma", -1.0), ("refresh", 0), ("sketches", 0), ("lr", 0.0)],
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadValue, match=f"{field}={value} must"):
        awt(**{field: value})
