"""The audit against closed forms, brute force, and itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defences import QUICK, THREAT
from torch import Tensor, nn

from trivet.audit.audit import Audit
from trivet.audit.findings import Findings
from trivet.audit.labels import distinct, in_pixels, label_of
from trivet.certify.smoothing import Smoothing
from trivet.data.dataset import Dataset
from trivet.errors import BadValue
from trivet.methods import build, spec_of
from trivet.threats.autoattack import AutoAttack
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

Audited = tuple[Findings, dict[str, Tensor]]


def linear_problem(classes: int = 3, points: int = 120) -> tuple[nn.Module, Dataset]:
    """A linear model and records away from 0 and 1, so that the box never binds."""
    source = torch.Generator().manual_seed(3)
    layer = nn.Linear(12, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 12, generator=source))
        layer.bias.copy_(-0.5 * layer.weight.sum(1))
    images = 0.3 + 0.4 * torch.rand(points, 3, 2, 2, generator=source)
    model = nn.Sequential(nn.Flatten(), layer)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::10] = (labels[::10] + 1) % classes  # a tenth is wrong from the start
    return model, Dataset(images, labels, tuple(map(str, range(classes))), "linear", scale=1.0)


@torch.no_grad()
def robust(model: nn.Module, data: Dataset, eps: float) -> Tensor:
    """[N] bool: z_y - z_j > eps ||w_y - w_j||_1 for all j != y, which is exact for a linear model."""
    logits, weight = model(data.images).double(), model[1].weight.double()  # type: ignore[index]
    y = data.labels
    margins = logits.gather(1, y[:, None]) - logits - eps * (weight[y][:, None] - weight[None]).abs().sum(2)
    return margins.scatter(1, y[:, None], torch.inf).amin(1) > 0


def test_on_a_linear_model_the_worst_case_is_the_closed_form() -> None:
    model, data = linear_problem()
    threat = Linf(0.03)
    audit = Audit(threat, attacks=(PGD(threat, 20, loss="margin"), AutoAttack(threat)), latency=())
    found, _ = audit.run(model, data, seed=1, name="linear", source="memory")
    exact = robust(model, data, 0.03)
    assert found.worst_case is not None
    assert found.worst_case.successes == int(exact.sum())
    assert 0 < found.worst_case.successes < found.clean.successes == 108
    by_class = [int(exact[data.labels == label].sum()) for label in range(3)]
    assert [rate.successes for rate in found.worst_by_class] == by_class
    assert found.curve is not None
    for point in found.curve.points:
        if point.eps < 0.1:  # beyond, the box binds
            assert point.accuracy.successes == int(robust(model, data, point.eps).sum())
    assert not found.flags


def test_the_worst_case_counts_points_that_no_attack_broke() -> None:
    model, data = linear_problem()
    weak, other = PGD(Linf(0.03), 1, step_size=0.03), PGD(Linf(0.02), 5)
    audit = Audit(Linf(0.03), attacks=(weak, other, weak), latency=(), curve=(0.0,))
    found, _ = audit.run(model, data, seed=0, name="linear", source="memory")
    assert [attack.label for attack in found.attacks] == ["PGD-1 (ce)", "PGD-5 (ce)", "PGD-1 (ce) #2"]
    counts = [attack.accuracy.successes for attack in found.attacks if attack.accuracy]
    assert found.worst_case is not None
    assert found.worst_case.successes <= min(counts)
    assert sum(rate.trials for rate in found.worst_by_class) == len(data)
    assert sum(rate.successes for rate in found.worst_by_class) == found.worst_case.successes


def test_autoattack_tells_which_part_broke_each_point() -> None:
    model, data = linear_problem()
    audit = Audit(Linf(0.03), attacks=(AutoAttack(Linf(0.03)),), latency=(), curve=(0.0,))
    found, _ = audit.run(model, data, seed=0, name="linear", source="memory")
    (attack,) = found.attacks
    assert set(attack.broke) == {"apgd_ce", "apgd_t", "fab_t", "square"}
    assert attack.accuracy is not None
    assert sum(attack.broke.values()) == found.clean.successes - attack.accuracy.successes


def test_examples_are_in_the_set_and_fool_the_model(plain: nn.Module, test_part: Dataset, plain_audit: Audited) -> None:
    found, examples = plain_audit
    clean, adversarial, index = examples["clean"], examples["adversarial"], examples["index"]
    assert len(index) == QUICK.examples == 4
    assert bool(THREAT.contains(adversarial, clean).all())
    assert torch.equal(clean, test_part.batch(index).inputs)
    assert torch.equal(examples["label"], test_part.labels[index])
    assert torch.equal(examples["clean_prediction"], examples["label"])
    assert torch.equal(plain(adversarial).argmax(1), examples["adversarial_prediction"])
    assert bool((examples["adversarial_prediction"] != examples["label"]).all())
    assert found.clean.successes == int(
        (plain(test_part.batch(torch.arange(200)).inputs).argmax(1) == test_part.labels[:200]).sum()
    )


def test_the_same_seed_gives_the_same_numbers(plain: nn.Module, test_part: Dataset, plain_audit: Audited) -> None:
    first, examples = plain_audit
    again, examples_again = QUICK.run(plain, test_part, seed=0, name="plain", source="memory")
    measured = {"clean", "worst_case", "worst_by_class", "curve", "checks", "artefact", "data"}
    assert first.model_dump(include=measured) == again.model_dump(include=measured)
    assert all(torch.equal(examples[key], examples_again[key]) for key in examples)


def test_at_radius_zero_attacks_leave_everything(plain: nn.Module, test_part: Dataset) -> None:
    audit = Audit(Linf(0.0), attacks=(PGD(Linf(0.0), 3),), points=50, latency=())
    found, examples = audit.run(plain, test_part, seed=0, name="plain", source="memory")
    assert found.worst_case == found.clean
    assert len(examples["index"]) == 0
    assert not found.flags


def test_the_model_and_the_global_random_stream_are_left_as_they_were(plain: nn.Module, test_part: Dataset) -> None:
    model = nn.Sequential(plain, nn.Dropout(0.5), nn.BatchNorm1d(10))
    model[1].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    replace(QUICK, points=20).run(model, test_part, seed=0, name="model", source="memory")
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_certificates_are_stated_at_the_threats_radius_or_the_usual_ones(plain: nn.Module, test_part: Dataset) -> None:
    smoothing = Smoothing(0.25, n=200)
    audit = replace(QUICK, points=20, certificate=smoothing, certificate_points=10, curve=(0.0,))
    found, _ = audit.run(plain, test_part, seed=0, name="plain", source="memory")
    assert found.certificate is not None
    assert [point.radius for point in found.certificate.at] == [0.25, 0.5, 1.0]
    obtained = smoothing.certify(plain, test_part.batch(torch.arange(10)).inputs, seed=0)
    right = (obtained.labels == test_part.labels[:10]) & (obtained.radii >= 0.25)
    assert found.certificate.at[0].accuracy.successes == int(right.sum())
    assert [point.accuracy.successes for point in found.certificate.curve] == sorted(
        (point.accuracy.successes for point in found.certificate.curve), reverse=True
    )
    l2 = Audit(L2(0.3), attacks=(PGD(L2(0.3), 3),), points=20, certificate=smoothing, certificate_points=10, latency=())
    found, _ = l2.run(plain, test_part, seed=0, name="plain", source="memory")
    assert found.certificate is not None
    assert [point.radius for point in found.certificate.at] == [0.3]


def test_sizes_and_speed_are_measured(plain: nn.Module, test_part: Dataset) -> None:
    audit = replace(QUICK, points=10, curve=(0.0,), latency=(1, 8))
    cost = audit.run(plain, test_part, seed=0, name="plain", source="memory")[0].cost
    weights = 64 * 64 + 64 * 64 + 64 * 10
    assert cost.parameters == weights + 64 + 64 + 10
    assert cost.flops == 2 * weights
    assert [each.batch_size for each in cost.latency] == [1, 8]
    assert all(0 < each.low <= each.median <= each.high for each in cost.latency)


def test_a_recipe_builds_the_audit_and_its_spec_builds_it_again() -> None:
    attacks = ["fgsm", {"name": "pgd", "steps": 7}]
    audit = build(
        "audit",
        {"name": "audit", "attacks": attacks, "certificate": {"name": "smoothing", "sigma": 0.5}},
        threat=THREAT,
    )
    assert audit.attacks[1] == PGD(THREAT, 7)
    assert audit.certificate == Smoothing(0.5)
    assert build("audit", spec_of(audit)) == audit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 0}, "points=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"confidence": 1.0}, "confidence"),
        ({"curve": (-0.1,)}, "curve"),
        ({"examples": -1}, "examples"),
        ({"diagnosis": -1}, "diagnosis=-1 must not be negative"),
        ({"threat": Linf(0.0), "curve": (0.1,)}, "eps=0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        Audit(**{"threat": THREAT, **settings})  # type: ignore[arg-type]


def test_a_model_of_other_classes_and_an_empty_dataset_are_refused_before_any_attack(test_part: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(BadValue, match="10 classes"):
        QUICK.run(model, test_part, seed=0, name="model", source="memory")
    with pytest.raises(BadValue, match="no records"):
        QUICK.run(model, test_part.select(slice(0, 0)), seed=0, name="model", source="memory")


def test_labels_say_what_matters() -> None:
    assert label_of(PGD(THREAT, 40, restarts=5, loss="margin", samples=20)) == "PGD-40 x5 (margin, EOT 20)"
    assert label_of(AutoAttack(THREAT)) == "AutoAttack (standard)"
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a #2", "a #3"]
    assert [in_pixels(eps) for eps in (8 / 255, 0.1, 0.0, 1.0, 0.12345678)] == ["8/255", "0.1", "0", "1", "0.1235"]
