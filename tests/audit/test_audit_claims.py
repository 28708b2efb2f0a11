"""Claims say what was found, and a new audit ends the claims that no longer hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from defences import QUICK
from torch import nn

from trivet.audit.claims import claims_from, recheck
from trivet.audit.findings import Findings
from trivet.audit.leak_finding import LeakFinding
from trivet.certify.smoothing import Smoothing
from trivet.claims import Claim, Ledger, PrivacyClaim
from trivet.data.dataset import Dataset
from trivet.statistics import Rate


@pytest.fixture(scope="module")
def findings(plain: nn.Module, test_part: Dataset) -> Findings:
    audit = replace(QUICK, attacks=QUICK.attacks * 2, certificate=Smoothing(0.25, n=200), certificate_points=10)
    audit = replace(audit, points=50, curve=(0.0,), latency=(1,))
    return audit.run(plain, test_part, seed=0, name="plain", source="memory")[0]


def made(findings: Findings, **changes: Any) -> list[Claim]:
    return claims_from(findings.model_copy(update=changes), made_by="audit", recheck="trivet audit runs/plain")


def ledger_of(findings: Findings, **changes: Any) -> Ledger:
    ledger = Ledger()
    ledger.add(*made(findings, **changes))
    return ledger


def private(findings: Findings, **changes: Any) -> PrivacyClaim:
    claim = PrivacyClaim(
        statement="(3, 1e-05)-differentially private.",
        value=3.0,
        unit="epsilon",
        obtained={"name": "dp_sgd"},
        recheck="trivet privacy runs/plain",
        artefact=findings.artefact,
        made_by="00-fit",
        delta=1e-5,
        adjacency="add_remove",
    )
    return claim.model_copy(update=changes)


def leak(**changes: Any) -> LeakFinding:
    common: dict[str, Any] = {"label": "One-run audit", "spec": {}, "access": "black box", "trained": 1, "seconds": 1.0}
    return LeakFinding(**{**common, "lower": 3.456, "delta": 1e-5, "claimed": 3.0, **changes})


def reasons(ledger: Ledger) -> dict[str, str | None]:
    return {claim.statement: claim.voided.reason if claim.voided else None for claim in ledger.claims}


def test_every_number_becomes_a_claim_with_its_interval(findings: Findings) -> None:
    claims = made(findings)
    assert [claim.kind for claim in claims] == [  # type: ignore[attr-defined]
        *["accuracy"],
        *["attack"] * 3,
        *["certificate"] * 3,
        *["cost"] * 6,
    ]
    accuracy, attack, _, worst, certificate, *_ = claims
    for claim, rate in (
        (accuracy, findings.clean),
        (attack, findings.attacks[0].accuracy),
        (worst, findings.worst_case),
    ):
        assert rate is not None
        assert claim.value == pytest.approx(100 * rate.value)
        assert claim.interval == pytest.approx(tuple(100 * end for end in rate.interval))
        assert f"{claim.value:.1f} %" in claim.statement
        assert (claim.confidence, claim.unit) == (0.95, "%")
    assert any("smoothed classifier" in condition for condition in certificate.conditions)
    assert all(claim.artefact == findings.artefact and claim.recheck == "trivet audit runs/plain" for claim in claims)
    assert claims[-1].unit == "ms"


def test_claims_survive_the_ledgers_file(findings: Findings, tmp_path: Path) -> None:
    ledger = ledger_of(findings)
    ledger.save(tmp_path / "claims.json")
    assert Ledger.load(tmp_path / "claims.json").claims == ledger.claims


def test_doubt_about_the_attacks_stands_in_their_claims_alone(findings: Findings) -> None:
    (flag, *_) = [check for check in findings.checks if check.name == "zero_gradients"]
    claims = made(findings, checks=(flag.model_copy(update={"raised": True}),))
    for claim in claims:
        doubtful = any("doubtful" in condition for condition in claim.conditions)
        assert doubtful == (claim.kind == "attack")  # type: ignore[attr-defined]
        assert "robust accuracy" not in claim.statement
    assert any("robust accuracy" in claim.statement for claim in made(findings))


def test_the_same_findings_again_supersede_and_contradict_nothing(findings: Findings) -> None:
    ledger = ledger_of(findings)
    recheck(ledger, findings.model_copy(update={"seed": 9}))
    assert set(reasons(ledger).values()) == {"measured again"}
    ledger.add(*made(findings))
    assert len(ledger.holding) == len(made(findings))


def test_claims_about_other_weights_are_voided(findings: Findings) -> None:
    ledger = ledger_of(findings, artefact="0" * 64)
    recheck(ledger, findings)
    assert set(reasons(ledger).values()) == {"the weights are not those it was made for"}


def test_attacks_on_other_weights_are_voided_even_if_nobody_asks_again(findings: Findings) -> None:
    other = findings.attacks[0].model_copy(update={"spec": {"name": "pgd", "steps": 3}})
    ledger = ledger_of(findings, artefact="0" * 64, attacks=(other,), certificate=None)
    recheck(ledger, findings.model_copy(update={"attacks": (), "worst_case": None}))
    assert not any(claim.kind == "attack" for claim in ledger.holding)  # type: ignore[attr-defined]


def test_a_value_outside_both_intervals_is_contradicted(findings: Findings) -> None:
    far, near = Rate(findings.clean.successes - 15, 50), Rate(findings.clean.successes - 1, 50)
    for rate, reason in ((far, "contradicted on re-check"), (near, "measured again")):
        ledger = ledger_of(findings)
        recheck(ledger, findings.model_copy(update={"clean": rate}))
        assert ledger.claims[0].voided is not None
        assert ledger.claims[0].voided.reason == reason


def test_an_exact_number_that_changed_is_contradicted(findings: Findings) -> None:
    ledger = ledger_of(findings)
    recheck(ledger, findings.model_copy(update={"cost": findings.cost.model_copy(update={"file_bytes": 1})}))
    changed = [claim for claim in ledger.claims if claim.voided and claim.voided.reason.startswith("contradicted")]
    assert [claim.unit for claim in changed] == ["bytes"]


def test_what_is_not_asked_again_keeps_holding(findings: Findings) -> None:
    """Another threat, other records, another machine, and privacy, which an audit of outputs cannot judge."""
    privacy = private(findings)
    ledger = ledger_of(findings)
    ledger.add(privacy)
    elsewhere = findings.model_copy(
        update={
            "threat": {"name": "l2", "eps": 1.0},
            "data": findings.data.model_copy(update={"digest": "1" * 64}),
            "cost": findings.cost.model_copy(
                update={"latency": (findings.cost.latency[0].model_copy(update={"machine": "another"}),)}
            ),
        }
    )
    recheck(ledger, elsewhere)
    assert privacy in ledger.holding
    ended = {claim.unit for claim in ledger.claims if not claim.holds}
    assert ended == {"", "bytes", "FLOPs"}


def test_a_leak_test_above_the_claim_ends_it_and_says_which(findings: Findings) -> None:
    ledger = Ledger((private(findings),))
    recheck(ledger, findings.model_copy(update={"leaks": (leak(lower=1.0, label="weak"), leak())}))
    assert ledger.claims[0].voided is not None
    assert ledger.claims[0].voided.stage == "audit"
    assert ledger.claims[0].voided.reason == (
        "contradicted by One-run audit: epsilon is at least 3.45 at delta 1e-5, with 95 % confidence"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"lower": 3.0},  # as large as the claim, not larger
        {"lower": None, "delta": None},  # a membership attack, which bounds nothing
        {"delta": 1e-7},  # says nothing about a larger delta
    ],
)
def test_a_leak_test_that_does_not_exceed_the_claim_leaves_it(findings: Findings, changes: dict[str, Any]) -> None:
    ledger = Ledger((private(findings),))
    recheck(ledger, findings.model_copy(update={"leaks": (leak(**changes),)}))
    assert ledger.claims == (private(findings),)


def test_what_fails_at_a_larger_delta_fails_at_the_claimed_one(findings: Findings) -> None:
    ledger = Ledger((private(findings),))
    recheck(ledger, findings.model_copy(update={"leaks": (leak(delta=1e-3),)}))
    assert not ledger.holding


def test_a_privacy_claim_is_about_its_weights_alone_and_survives_audits_of_them(findings: Findings) -> None:
    ledger = Ledger((private(findings), private(findings, artefact="0" * 64)))
    for _ in range(2):
        recheck(ledger, findings)
        ledger.add(*made(findings))
    kept, ended = ledger.claims[:2]
    assert kept.holds
    assert ended.voided is not None
    assert ended.voided.reason == "the weights are not those it was made for"
