"""Numbers that contradict each other are errors, and true ones never contradict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from defences import QUICK, Defence, same
from torch import Tensor, nn

from trivet.audit import consistency
from trivet.audit.findings import Findings
from trivet.certify.certifier import Certificates, Certifier
from trivet.data.dataset import Dataset
from trivet.display import Advance


@dataclass(frozen=True)
class Stated(Certifier):
    """States the same radius for every input, around the model's own answer: true or not."""

    radius: float
    norm: str = "Linf"
    shift: int = 0

    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        labels = (model(x).argmax(1) + self.shift) % 10
        radii = torch.full((len(x),), self.radius, dtype=torch.float64)
        return Certificates(
            torch.arange(len(x)) if index is None else index, labels, radii, self.norm, 0.0, ("stated",)
        )


def raised(findings: Findings) -> set[str]:
    return {check.name for check in findings.flags if check.severity == "error"}


def audited(model: nn.Module, data: Dataset, certificate: Certifier | None = None) -> Findings:
    audit = replace(QUICK, certificate=certificate, points=100, curve_points=20)
    return audit.run(model, data, seed=0, name="model", source="memory")[0]


def test_a_certificate_that_an_attack_refutes_is_an_error(plain: nn.Module, test_part: Dataset) -> None:
    for certifier in (Stated(0.1), Stated(0.75, "L2")):
        found = audited(plain, test_part, certifier)
        assert raised(found) == {"certificate_refuted"}, "the l_2 norm of an l_inf perturbation of 0.1 is below 0.8"


def test_a_certificate_that_holds_is_none(plain: nn.Module, test_part: Dataset) -> None:
    found = audited(plain, test_part, Stated(1e-4))
    assert raised(found) == set()
    assert found.certificate is not None
    assert found.certificate.at[0].radius == QUICK.threat.eps
    assert found.certificate.at[0].accuracy.successes == 0


def test_a_certificate_for_another_label_is_an_error(plain: nn.Module, test_part: Dataset) -> None:
    assert "certificate_disagrees" in raised(audited(plain, test_part, Stated(1e-4, shift=1)))


def test_certificates_of_a_smoothed_classifier_are_not_held_against_the_model_that_was_attacked() -> None:
    """A proof about the model, whatever its alpha, is refuted by the very same numbers."""
    one = torch.ones(1, dtype=torch.int64)
    near = torch.tensor([0.5], dtype=torch.float64)
    for about, expected in (("model", True), ("smoothed", None)):
        for alpha in (0.0, 0.001):
            certificates = Certificates(torch.arange(1), one, torch.ones(1, dtype=torch.float64), "L2", alpha, ())
            refuted, _ = consistency.of_certificates(certificates, about, one, one, near)  # type: ignore[arg-type]
            assert refuted.raised is expected


def test_a_model_that_mixes_the_records_of_a_batch_is_an_error(plain: nn.Module, test_part: Dataset) -> None:
    mixing = Defence(plain, lambda x: (x - x.mean(0, keepdim=True) + 0.3).clamp(0, 1), same)
    assert "depends_on_batch" in raised(audited(mixing, test_part))
    assert "depends_on_batch" not in raised(audited(plain, test_part))


def test_logits_that_are_not_numbers_are_an_error_and_count_as_wrong(plain: nn.Module, test_part: Dataset) -> None:
    def overflow(logits: Tensor) -> Tensor:
        return logits.where(logits.amax(1, keepdim=True) < logits.amax(1).median(), torch.nan)

    found = audited(Defence(plain, same, overflow), test_part)
    assert "not_finite" in raised(found)
    assert found.clean.value <= 0.55


def test_more_accurate_under_attack_than_without_is_an_error() -> None:
    right, left = torch.tensor([True, False]), torch.tensor([True, True])
    results: Callable[..., bool | None] = lambda *args: consistency.of_attacks(*args)[0].raised  # noqa: E731
    assert results(right, {"attack": left}, False) is True
    assert results(left, {"attack": right}, False) is False
    assert results(right, {"attack": left}, True) is None, "the answers of a randomised model differ anyway"
