"""Every flag is raised by a defence built to earn it, and by no plain network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defences import QUICK, Defence, same
from torch import Tensor, nn

from trivet.audit import masking
from trivet.audit.audit import EOT_SAMPLES, Audit
from trivet.audit.findings import Check, Findings
from trivet.audit.probes import Probes, default_curve, resized
from trivet.data.dataset import Dataset
from trivet.threats.autoattack import AutoAttack
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.square import Square


def raised(findings: Findings) -> set[str]:
    return {check.name for check in findings.checks if check.raised}


def audited(model: nn.Module, data: Dataset, audit: Audit = QUICK) -> Findings:
    return audit.run(model, data, seed=0, name="defence", source="memory")[0]


def test_a_plain_network_raises_no_flag(plain_findings: Findings) -> None:
    assert raised(plain_findings) == set()
    made = {check.name for check in plain_findings.checks if check.raised is not None}
    assert {"randomised", "zero_gradients", "losses_disagree", "black_box_stronger", "survives_everything"} <= made


def test_scaled_logits_are_found_out(plain: nn.Module, test_part: Dataset) -> None:
    found = audited(Defence(plain, same, lambda logits: 100 * logits), test_part)
    assert {"zero_gradients", "losses_disagree", "survives_everything"} <= raised(found)


def test_rounded_inputs_are_found_out(plain: nn.Module, test_part: Dataset) -> None:
    found = audited(Defence(plain, lambda x: (16 * x).round() / 16, same), test_part)
    assert {"zero_gradients", "zero_gradients_dlr", "black_box_stronger", "survives_everything"} <= raised(found)


def test_noise_is_found_out_and_attacked_in_expectation(plain: nn.Module, test_part: Dataset) -> None:
    noisy = Defence(plain, lambda x: x + 0.1 * torch.randn_like(x), same)
    found = audited(noisy, test_part, replace(QUICK, points=50, curve_points=50))
    assert found.randomised
    assert "randomised" in raised(found)
    battery = QUICK.battery(masking.Behaviour(10, 0.1, 0.1, False, False, True))
    assert battery == QUICK.attacks, "attacks that were asked for are run as they are"
    standard = replace(QUICK, attacks=()).battery(masking.Behaviour(10, 0.1, 0.1, False, False, True))
    assert AutoAttack(QUICK.threat, "rand") in standard
    assert all(attack.samples == EOT_SAMPLES for attack in standard if not isinstance(attack, AutoAttack))  # type: ignore[attr-defined]


def test_a_softmax_at_the_end_is_found_out(plain: nn.Module, test_part: Dataset) -> None:
    found = audited(Defence(plain, same, lambda logits: logits.softmax(1)), test_part)
    assert "probabilities" in raised(found)


def test_a_rugged_surface_is_found_out(plain: nn.Module, test_part: Dataset) -> None:
    """Where the slope points the right way only at the pixel values that records have, one big step beats many."""

    def wiggle(x: Tensor) -> Tensor:
        return x + 0.05 * torch.sin(32 * torch.pi * x)

    assert "one_step_stronger" in raised(audited(Defence(plain, wiggle, same), test_part))


def test_gradients_computed_inside_the_model_are_found_out(plain: nn.Module, test_part: Dataset) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8

    def purified(x: Tensor) -> Tensor:
        """`x` after one step down an energy of its own."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((point.flatten(1) @ weight).square().sum(), point)
        return x - 0.001 * slope

    grad, backward = torch.autograd.grad, torch.autograd.backward
    assert "inner_gradients" in raised(audited(Defence(plain, purified, same), test_part))
    assert (torch.autograd.grad, torch.autograd.backward) == (grad, backward)


def test_without_gradients_black_box_attacks_still_run(plain: nn.Module, test_part: Dataset) -> None:
    opaque = Defence(plain, lambda x: x.detach(), lambda logits: torch.from_numpy(logits.detach().numpy()))
    square = Square(QUICK.threat, queries=100)
    found = audited(opaque, test_part, replace(QUICK, attacks=(*QUICK.attacks, square), points=60))
    pgd, by_square = found.attacks
    assert pgd.accuracy is None
    assert "no input gradient" in pgd.note
    assert by_square.accuracy is not None
    assert by_square.accuracy.successes < found.clean.successes
    assert found.worst_case == by_square.accuracy
    assert "no_gradient" in raised(found)
    assert found.curve is None
    unmade = {check.name for check in found.checks if check.raised is None}
    assert {"zero_gradients", "zero_gradients_dlr"} <= unmade
    standard = replace(QUICK, attacks=()).battery(masking.Behaviour(10, 0, 0, False, False, False))
    assert any(isinstance(attack, Square) for attack in standard)


def test_another_runtime_error_is_not_taken_for_a_missing_gradient(test_part: Dataset) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise RuntimeError("out of memory")
            return torch.zeros(len(x), 10)

    with pytest.raises(RuntimeError, match="out of memory"):
        audited(Broken(), test_part)


def probes(points: int = 200, **standing: int) -> Probes:
    """Probes of which the first so many points stand; all attacks agree unless told otherwise."""

    def first(number: int) -> Tensor:
        return torch.arange(points) < number

    left = {name: first(standing.get(name, 100)) for name in ("one_step", "ce", "margin", "longer", "white_box")}
    black_box = first(standing.get("black_box", standing.get("white_box", 100)))
    curve = {0.0: first(190), 0.1: first(100), 0.2: first(standing.get("far", 50))}
    return Probes(first(190), **left, curve=curve, whole=first(standing.get("whole", 0)), black_box=black_box)


def check(name: str, found: Probes) -> Check:
    return next(each for each in masking.of_probes(found, 0.1, 10) if each.name == name)


@pytest.mark.parametrize(
    ("name", "noticed", "unnoticed"),
    [
        ("one_step_stronger", {"one_step": 90}, {"one_step": 97}),
        ("losses_disagree", {"margin": 75}, {"margin": 85}),
        ("losses_disagree", {"margin": 125}, {"margin": 115}),
        ("black_box_stronger", {"black_box": 95}, {"black_box": 97}),
        ("more_effort", {"longer": 94}, {"longer": 97}),
        ("rises_with_eps", {"far": 110}, {"far": 102}),
        ("survives_everything", {"whole": 35}, {"whole": 25}),
    ],
)
def test_a_comparison_counts_beyond_threshold_and_chance(
    name: str, noticed: dict[str, int], unnoticed: dict[str, int]
) -> None:
    """Of 200 points: the thresholds of 0.2, 0.5 and 5 points, with two standard errors of a paired difference."""
    assert check(name, probes(**noticed)).raised
    assert not check(name, probes(**unnoticed)).raised


def test_square_breaking_what_gradients_left_is_autoattacks_own_flag() -> None:
    (quiet,) = masking.of_components({"apgd_ce": 400, "square": 1}, 1000)
    (loud,) = masking.of_components({"apgd_ce": 400, "square": 8}, 1000)
    assert not quiet.raised
    assert loud.raised
    assert loud.measured["broken by Square, %"] == pytest.approx(0.8)


def test_few_classes_are_a_note_and_no_doubt() -> None:
    seen = masking.Behaviour(2, 0.0, 0.0, False, False, True, 0.0, 0.0)
    (note,) = [each for each in masking.of_behaviour(seen) if each.raised]
    assert (note.name, note.severity) == ("few_classes", "note")


def test_the_curve_ends_where_every_image_is_allowed() -> None:
    assert default_curve(Linf(0.1), 64)[-1] == 1.0
    assert default_curve(L2(0.5), 64)[-1] == 8.0
    for eps in (1 / 255, 0.1, 8 / 255, 0.3):
        assert resized(Linf(eps), 1.0).eps == pytest.approx(1.0)
        assert resized(Linf(eps), 1.0).eps <= 1.0
