"""Audits against unions: each type and all of them on the same points, mixtures apart, and masked types found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defences import Defence, same
from torch import Tensor, nn

from trivet.audit import gradients, masking, perturbation_types
from trivet.audit.audit import Audit
from trivet.audit.claims import claims_from
from trivet.audit.findings import Findings
from trivet.audit.labels import threat_name
from trivet.audit.probes import default_curve, whole_range
from trivet.data.dataset import Dataset
from trivet.methods import spec_of
from trivet.threats.affine import Affine
from trivet.threats.autoattack import AutoAttack
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.threats.pointwise import Pointwise
from trivet.threats.rotation_translation import RotationTranslation, RotationTranslationSearch
from trivet.threats.slide import Slide
from trivet.threats.square import Square
from trivet.threats.union import Union

RT = RotationTranslation(shift=0.5, angle=10.0, shifts=3, angles=3)
THREE = Union((Linf(0.03), L1(0.8), RT))
SEEN = masking.Behaviour(10, 0.0, 0.0, False, False, True)
AUDIT = Audit(
    THREE,
    attacks=(PGD(THREE, 10, loss="margin"), Pointwise(L1(0.8), restarts=1), Affine(THREE, steps=5, restarts=2)),
    points=100,
    curve_points=100,
    explanations=0,
    latency=(),
    examples=2,
)


@pytest.fixture(scope="module")
def found(plain: nn.Module, test_part: Dataset) -> Findings:
    return AUDIT.run(plain, test_part, seed=0, name="plain", source="memory")[0]


def test_an_attack_on_the_union_is_run_on_every_member_and_rotations_are_searched(found: Findings) -> None:
    assert [attack.label for attack in found.attacks] == [
        "PGD-10 (margin), linf 0.03",
        "PGD-10 (margin), l1 0.8",
        "Rotation and translation search, rotation_translation 0.5 px 10°",
        "Pointwise, l1 0.8",
        "Affine-5 x2 (margin), mixing types",
    ]


def test_the_worst_case_of_the_union_is_at_most_that_of_each_type_and_of_each_attack(found: Findings) -> None:
    assert found.worst_case is not None
    assert list(found.worst_by_type) == ["linf 0.03", "l1 0.8", "rotation_translation 0.5 px 10°"]
    left = {attack.label: attack.accuracy for attack in found.attacks}
    assert all(found.worst_case.successes <= each.successes for each in found.worst_by_type.values())
    assert found.worst_by_type["linf 0.03"] == left["PGD-10 (margin), linf 0.03"]
    l1 = [rate.successes for label, rate in left.items() if label.endswith("l1 0.8") and rate]
    assert found.worst_by_type["l1 0.8"].successes <= min(l1)
    assert 0 < found.worst_case.successes < found.clean.successes


def test_mixtures_are_reported_and_count_neither_in_the_worst_case_nor_as_claims(
    found: Findings, plain: nn.Module, test_part: Dataset
) -> None:
    mixed = found.attacks[-1]
    assert mixed.outside
    assert not any(attack.outside for attack in found.attacks[:-1])
    without = replace(AUDIT, attacks=AUDIT.attacks[:-1], curve=(0.0,))
    again = without.run(plain, test_part, seed=0, name="plain", source="memory")[0]
    assert again.worst_case == found.worst_case
    stated = [claim.statement for claim in claims_from(found, "audit", "trivet audit")]
    assert not any("Affine" in statement for statement in stated)
    assert any("All 4 attacks together at linf 0.03 or l1 0.8 or rotation" in statement for statement in stated)


def test_the_curve_scales_all_members_and_falls(found: Findings) -> None:
    assert found.curve is not None
    assert [point.eps for point in found.curve.points] == [0.0, 0.5, 1.0, 1.5, 2.0, pytest.approx(1 / 0.03)]
    left = [point.accuracy.successes for point in found.curve.points]
    assert left == sorted(left, reverse=True)
    (everything,) = [check for check in found.checks if check.name == "survives_everything"]
    assert everything.raised is False


def test_the_standard_battery_attacks_every_type_with_and_without_gradients_and_mixes_them() -> None:
    battery = perturbation_types.battery(THREE, (), SEEN, 20)
    for ball in (Linf(0.03), L1(0.8)):
        assert {PGD(ball, 40, restarts=5), PGD(ball, 40, restarts=5, loss="margin"), AutoAttack(ball)} <= set(battery)
    assert {Slide(L1(0.8), restarts=5), Pointwise(L1(0.8)), RotationTranslationSearch(RT), Affine(THREE)} <= set(
        battery
    )
    assert not any(isinstance(each, Affine) for each in perturbation_types.battery(Union((RT,)), (), SEEN, 20))
    blind = perturbation_types.battery(THREE, (), replace(SEEN, differentiable=False), 20)
    assert {Square(Linf(0.03)), Square(L1(0.8))} <= set(blind)


def test_a_type_whose_gradients_are_masked_is_found_out(plain: nn.Module, test_part: Dataset) -> None:
    """Rounded inputs: gradients are zero, decisions are as before."""
    rounded = Defence(plain, lambda x: (8 * x).round() / 8, same)
    wide = Union((Linf(0.03), L1(2.0), RT))
    attacks = (PGD(wide, 10, loss="margin"), Pointwise(L1(2.0), restarts=1))
    found = replace(AUDIT, threat=wide, attacks=attacks, curve=(0.0,)).run(
        rounded, test_part, seed=0, name="defence", source="memory"
    )[0]
    (check,) = [check for check in found.checks if check.name == "gradient_free_stronger"]
    assert check.raised
    assert check.measured["l1 2, %"] > 10
    assert "rotation" not in " ".join(check.measured), "what was searched without gradients only cannot be compared"
    assert found.worst_by_type["l1 2"].value < 0.85


def test_a_plain_networks_types_are_not(found: Findings) -> None:
    (check,) = [check for check in found.checks if check.name == "gradient_free_stronger"]
    assert check.raised is False


class Thresholds(nn.Module):
    """Only whether a pixel is bright counts, as in the networks that l_inf training on MNIST gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((50 * (x - 0.5) + 0.5).clamp(0, 1))


def test_thresholded_inputs_are_found_out(plain: nn.Module, test_part: Dataset) -> None:
    x = test_part.batch(torch.arange(200)).inputs
    x = torch.where((x - 0.5).abs() < 0.1, x + 0.2, x)  # no grey level on the step itself
    y = test_part.labels[:200]
    hidden, open_ = gradients.thresholding(Thresholds(), x, y), gradients.thresholding(plain, x, y)
    assert hidden == (pytest.approx(0.0, abs=1e-6), 1.0)
    assert open_ is not None
    for measured, expected in ((hidden, True), (open_, False)):
        seen = replace(SEEN, stark=measured[0], dead_pixels=measured[1])
        (check,) = [each for each in masking.of_behaviour(seen) if each.name == "thresholds_inputs"]
        assert check.raised is expected
    assert gradients.thresholding(plain, (x > 0.5).float(), y) is None


def test_the_whole_range_of_a_union_is_that_of_the_first_member_to_reach_it() -> None:
    assert whole_range(Union((Linf(0.5), L1(2.0))), 64) == pytest.approx(2.0)
    assert whole_range(Union((Linf(0.01), L2(4.0))), 64) == pytest.approx(2.0)
    assert whole_range(Union((RT,)), 64) is None
    for eps in (1 / 255, 0.03, 0.1, 8 / 255, 0.3, 0.7):
        union = Union((Linf(eps), L1(0.1)))
        radii = default_curve(union, 64)
        assert union.scaled(radii[-1]).members[0].eps <= 1.0
        assert all(union.scaled(radius).members for radius in radii)


def test_threats_are_named_in_a_few_words() -> None:
    assert threat_name(spec_of(Linf(8 / 255))) == "linf 8/255"
    assert threat_name(spec_of(Union((Linf(0.1), L1(2.0)), eps=0.5))) == "linf 0.1 or l1 2, 0.5 times as large"
