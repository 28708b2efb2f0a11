"""Audited models side by side, as rows for terminals and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trivet.audit.findings import Findings
from trivet.audit.labels import threat_name
from trivet.audit.privacy_standing import standing
from trivet.audit.subject import Subject
from trivet.statistics import Rate


def comparison(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """One row for each model; rates in percent. The same columns in every row, None where it was not measured.

    Accuracies under attack are upper bounds on robust accuracy.
    """
    rows = [_row(subject.name, subject.findings) | {"privacy": standing(subject).short} for subject in subjects]
    columns = {column: None for row in rows for column in row}
    places = ("worst case", "certified", "privacy", "bytes", "ms", "flags")
    last = [column for place in places for column in columns if column.startswith(place)]
    order = [column for column in columns if column not in last] + last
    return [{column: row.get(column) for column in order} for row in rows]


def _row(name: str, found: Findings) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "threat": threat_text(found.threat), "clean": _percent(found.clean)}
    row |= {attack.label: _percent(attack.accuracy) for attack in found.attacks}
    row |= {f"worst case, {name}": _percent(left) for name, left in found.worst_by_type.items()}
    row["worst case"] = _percent(found.worst_case)
    if found.severity is not None:  # severity alone favours models with many near misses
        clean, *attacked = found.severity.conditions
        row["hdist"] = round(clean.hdist, 3)
        row["hdist under attack"] = round(attacked[-1].hdist, 3) if attacked else None
    if found.certificate is not None:
        headline = found.certificate.at[0]
        row[f"certified, {found.certificate.norm} {headline.radius:g}"] = _percent(headline.accuracy)
    row["bytes"] = found.cost.file_bytes
    if found.cost.made_small is not None:
        row["bytes packed"] = found.cost.made_small
    if found.cost.latency:
        row["ms"] = float(f"{1e3 * found.cost.latency[0].median:.3g}")
    row["flags"] = ", ".join(check.name for check in found.flags)
    return row


def threat_text(threat: dict[str, Any]) -> str:
    """E.g. "linf 8/255"."""
    return threat_name(threat)


def _percent(rate: Rate | None) -> float | None:
    return None if rate is None else round(100 * rate.value, 2)
