"""The learning curves of features, in the report of a run that logged them and in no other."""

from __future__ import annotations

from trivet.audit.findings import Findings
from trivet.audit.record import training
from trivet.audit.subject import Subject


def test_logged_alignments_are_drawn_beside_the_loss(plain_findings: Findings) -> None:
    log = [
        {"stage": 0, "epoch": float(n), "loss": 1.0 / (1 + n), "robust_features": 0.5 * n, "non_robust_features": 1.0}
        for n in range(5)
    ]
    page = training([Subject("patches", plain_findings, log=log)])
    assert page.count("<svg") == 2
    assert "alignment against epoch: robust, non-robust" in page
    curves = page.split("features learnt")[1]
    assert curves.count("<polyline") == 2
    rising = [float(point.split(",")[1]) for point in curves.split('points="')[1].split('"')[0].split()]
    assert rising == sorted(rising, reverse=True)  # upwards is towards smaller y
    assert min(rising) < rising[0] - 200


def test_a_log_without_them_has_the_loss_alone(plain_findings: Findings) -> None:
    log = [{"stage": 0, "epoch": float(n), "loss": 1.0} for n in range(5)]
    page = training([Subject("plain", plain_findings, log=log)])
    assert page.count("<svg") == 1
    assert "features learnt" not in page
