"""Findings survive the way to disk and back, and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from defences import QUICK

from trivet.audit.findings import Findings
from trivet.audit.leak_finding import LeakFinding, LowFprPoint
from trivet.errors import TrivetError
from trivet.methods import build, spec_of
from trivet.models.fingerprint import fingerprint
from trivet.statistics import Rate


def test_findings_come_back_from_disk_as_they_were(plain_findings: Findings, tmp_path: Path) -> None:
    plain_findings.save(tmp_path / "audit.json")
    assert Findings.load(tmp_path / "audit.json") == plain_findings


def test_the_file_spells_out_every_rate(plain_findings: Findings, tmp_path: Path) -> None:
    plain_findings.save(tmp_path / "audit.json")
    content = json.loads((tmp_path / "audit.json").read_text())
    rate = plain_findings.clean
    expected = {"successes": rate.successes, "trials": 200, "confidence": 0.95, "value": rate.value}
    assert content["clean"] == {**expected, "interval": list(rate.interval)}
    assert set(content["attacks"][0]["accuracy"]) == set(content["clean"])


def test_findings_say_whose_they_are_and_how_they_were_obtained(plain_findings: Findings, plain, test_part) -> None:  # type: ignore[no-untyped-def]
    found = plain_findings
    assert found.artefact == fingerprint(plain)
    assert found.data.digest == test_part.select(slice(0, 200)).digest()
    assert (found.data.points, found.seed) == (200, 0)
    assert build("audit", found.settings) == QUICK
    assert found.threat == spec_of(QUICK.threat)
    assert {"command", "date", "machine", "versions"} <= set(found.provenance)
    assert all(attack.seconds > 0 for attack in found.attacks)


def test_leak_tests_join_the_findings_later_and_older_files_have_none(plain_findings: Findings, tmp_path: Path) -> None:
    low = LowFprPoint(nominal=0.01, fpr=Rate(3, 300), tpr=Rate(9, 300))
    found = LeakFinding(label="LiRA", spec={}, access="black box", trained=4, seconds=2.0, low_fpr=(low,))
    with_leaks = plain_findings.model_copy(update={"leaks": (found,)})
    with_leaks.save(tmp_path / "audit.json")
    assert Findings.load(tmp_path / "audit.json") == with_leaks
    content = plain_findings.model_dump(mode="json")
    del content["leaks"], content["diagnosis"]
    (tmp_path / "older.json").write_text(json.dumps(content))
    assert Findings.load(tmp_path / "older.json") == plain_findings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "another version"),
        ({"clean": {"successes": 5, "trials": 4, "confidence": 0.95}}, "is no rate"),
        ({"clean": {"successes": 5}}, "clean"),
        ({"artefact": None}, "artefact"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_damaged_findings_are_refused_with_the_field(
    plain_findings: Findings, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "audit.json"
    path.write_text(json.dumps({**plain_findings.model_dump(mode="json"), **change}))
    with pytest.raises(TrivetError, match=message):
        Findings.load(path)
