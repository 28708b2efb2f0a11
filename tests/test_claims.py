"""The ledger: what each stage does to each claim is what the design's table says, and nothing is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trivet.claims import (
    AccuracyClaim,
    AttackClaim,
    CertificateClaim,
    Claim,
    CostClaim,
    Effect,
    Ledger,
    PrivacyClaim,
    Verdict,
)
from trivet.errors import TrivetError
from trivet.methods import build

COMMON: dict[str, Any] = {
    "statement": "s",
    "unit": "share",
    "obtained": {"name": "m"},
    "recheck": "trivet audit x",
    "artefact": "a" * 64,
    "made_by": "audit",
}


def claims() -> tuple[Claim, ...]:
    return (
        PrivacyClaim(**COMMON, value=2.9, delta=1e-5, adjacency="add_remove"),
        CertificateClaim(**COMMON, value=0.6, norm="L2", radius=0.5, points=100),
        AttackClaim(**COMMON, value=0.47, threat={"name": "linf", "eps": 0.1}, points=100),
        AccuracyClaim(**COMMON, value=0.98, points=100),
        CostClaim(**COMMON, value=38912, measure="bytes"),
    )


def effect(verdict: Verdict) -> Effect:
    each = (verdict, "because")
    return Effect(privacy=each, certificate=each, attack=each, accuracy=each, cost=each)


@pytest.mark.parametrize("verdict", [Verdict.VOID, Verdict.COMPOSE, Verdict.RECOMPUTE])
def test_what_a_stage_voids_is_kept_with_stage_and_reason(verdict: Verdict) -> None:
    ledger = Ledger(claims())
    ledger.apply("prune", effect(verdict))
    assert ledger.holding == ()
    assert len(ledger.claims) == 5
    for claim in ledger.claims:
        assert claim.voided is not None
        assert (claim.voided.stage, claim.voided.reason) == ("prune", "because")


def test_what_a_stage_keeps_still_holds() -> None:
    ledger = Ledger(claims())
    ledger.apply("export", effect(Verdict.KEEP))
    assert ledger.holding == claims()


def test_a_voided_claim_keeps_its_first_reason() -> None:
    ledger = Ledger(claims())
    ledger.apply("first", effect(Verdict.VOID))
    ledger.apply("second", effect(Verdict.VOID))
    assert {claim.voided.stage for claim in ledger.claims if claim.voided} == {"first"}


def test_plain_training_voids_privacy_certificates_and_attacks_but_not_the_size() -> None:
    ledger = Ledger(claims())
    ledger.apply("fit", build("training", {"name": "fit", "objective": "plain"}).effect())
    assert [claim.kind for claim in ledger.holding] == ["cost"]  # type: ignore[attr-defined]
    privacy = ledger.claims[0].voided
    assert privacy is not None
    assert "epsilon is infinite" in privacy.reason


def test_the_same_question_answered_again_supersedes_the_old_answer_only() -> None:
    ledger = Ledger(claims())
    ledger.add(claims()[2].model_copy(update={"value": 0.45, "artefact": "b" * 64}))
    values = [claim.value for claim in ledger.holding if isinstance(claim, AttackClaim)]
    assert values == [0.45]
    assert len(ledger.holding) == 5
    other_threat = claims()[2].model_copy(update={"threat": {"name": "linf", "eps": 0.2}})
    ledger.add(other_threat)
    assert len(ledger.holding) == 6


def test_a_ledger_survives_the_disk(tmp_path: Path) -> None:
    ledger = Ledger(claims())
    ledger.apply("prune", effect(Verdict.VOID))
    ledger.add(*claims())
    ledger.save(tmp_path / "claims.json")
    assert Ledger.load(tmp_path / "claims.json").claims == ledger.claims


@pytest.mark.parametrize(
    "content",
    ["[]", '{"format": 2, "claims": []}', '{"format": 1}', '{"format": 1, "claims": [{"kind": "magic"}]}', "{"],
)
def test_a_damaged_ledger_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "claims.json"
    path.write_text(content)
    with pytest.raises(TrivetError, match=r"claims\.json"):
        Ledger.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_claimed_with_a_number_that_is_none(value: float) -> None:
    with pytest.raises(ValidationError):
        AccuracyClaim(**COMMON, value=value, points=1)
