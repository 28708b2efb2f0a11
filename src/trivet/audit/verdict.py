"""The head of the report: what was audited, what to beware of, the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence

from trivet.audit import charts, privacy_evidence
from trivet.audit.cells import DASH, amount, interval, key, rate, rate_in_line, right, seconds, size, state
from trivet.audit.findings import Check, Findings
from trivet.audit.html import Content, Html, facts, section, table, tag, text
from trivet.audit.leak_finding import LeakFinding
from trivet.audit.privacy_standing import Standing, rounded_down, standing
from trivet.audit.subject import Subject
from trivet.audit.table import threat_text
from trivet.certify.curves import format_radius
from trivet.statistics import Rate
from trivet.training.private_stage import NEIGHBOURS, delta_text, rounded_up


def masthead(title: str, subjects: Sequence[Subject]) -> Html:
    """What was audited, on what, against what."""
    found = [subject.findings for subject in subjects]
    records = sorted({f"{each.data.points:,} records of {each.data.name}" for each in found})
    threats = sorted({threat_text(each.threat) for each in found})
    dates = sorted({str(each.provenance.get("date", ""))[:10] for each in found})
    pairs = [
        ("audited on", " · ".join(records)),
        ("against", " · ".join(threats)),
        ("privacy", " · ".join(dict.fromkeys(standing(subject).short for subject in subjects))),
        ("date", " to ".join(dates[:: max(1, len(dates) - 1)])),
    ]
    return text([tag("p", "Trivet · audit report", class_="kicker"), tag("h1", title), facts(pairs)])


def warnings(subjects: Sequence[Subject]) -> Html:
    """What a reader must know before any number."""
    boxes = []
    for subject in subjects:
        boxes.append(privacy_evidence.warnings(subject))
        errors = [check for check in subject.findings.flags if check.severity == "error"]
        doubts = [check for check in subject.findings.flags if check.severity == "warning"]
        if errors:
            title = f"Numbers contradict each other in {subject.name}"
            boxes.append(
                _box("error", title, errors, "No figure of this model can be trusted until this is explained.")
            )
        if doubts:
            advice = (
                "The accuracies under attack are upper bounds by attacks that may have been hindered rather than "
                "withstood. Do not quote them as robust accuracy until an attack made for this model has been tried."
            )
            boxes.append(_box("warning", f"Gradient masking is suspected in {subject.name}", doubts, advice))
    return text(boxes)


def _box(kind: str, title: str, checks: Sequence[Check], advice: str) -> Html:
    items = [tag("li", tag("b", check.title), f". {check.meaning}") for check in checks]
    return tag("aside", tag("h2", title), tag("ul", items), tag("p", advice), class_=kind, role="alert")


def verdict(subjects: Sequence[Subject]) -> Html:
    """The headline numbers: big ones for a single model, a table for several."""
    confidence = 100 * subjects[0].findings.clean.confidence
    lead = (
        "Accuracy under attack is an upper bound: a stronger attack can only lower it. "
        f"Intervals are exact (Clopper-Pearson) at {confidence:g} % confidence."
    )
    if len(subjects) == 1:
        found = subjects[0].findings
        return section("verdict", "Verdict", _tiles(subjects[0]), _attacks(found), lead=lead)
    details = [
        tag("details", tag("summary", key(number, subject.name), ", attack by attack"), _attacks(subject.findings))
        for number, subject in enumerate(subjects)
    ]
    return section("verdict", "Verdict", _comparison(subjects), *details, lead=lead)


def _tiles(subject: Subject) -> Html:
    found = subject.findings
    tiles = [_tile("Clean accuracy", found.clean, "without attack")]
    if found.worst_case is not None:
        ran = sum(attack.accuracy is not None and not attack.outside for attack in found.attacks)
        tiles.append(
            _tile("Under attack", found.worst_case, f"{_worst_of(ran)}, {threat_text(found.threat)}", "at most")
        )
    if found.certificate is not None:
        point = found.certificate.at[0]
        where = f"within {found.certificate.norm} radius {format_radius(point.radius)}, {point.accuracy.trials} points"
        tiles.append(_tile("Certified", point.accuracy, where))
    private = standing(subject)
    if private.claim is not None or found.leaks:
        tiles.append(_privacy_tile(private, found.leaks))
    tiles.append(_amount_tile("Size", *size(found.cost.file_bytes), f"{found.cost.parameters:,} parameters"))
    if found.cost.latency:
        first = found.cost.latency[0]
        note = f"batch of {first.batch_size}, quartiles {1e3 * first.low:.3g} to {1e3 * first.high:.3g}"
        tiles.append(_amount_tile("Latency", f"{1e3 * first.median:.3g}", "ms", note))
    return tag("div", tiles, class_="tiles")


def _worst_of(attacks: int) -> str:
    return f"worst case of {attacks} attacks" if attacks > 1 else "after one attack"


def _tile(title: str, found: Rate, where: str, before: str = "") -> Html:
    number = tag(
        "p", tag("span", f"{before} ") if before else "", tag("b", f"{100 * found.value:.1f}"), " %", class_="big"
    )
    drawn = charts.whisker(found.value, *found.interval)
    notes = [tag("p", each, class_="small") for each in (interval(found), where)]
    return tag("div", tag("h3", title), number, drawn, notes, class_="tile")


def _amount_tile(title: str, value: str, unit: str, note: str) -> Html:
    said = tag("p", tag("b", value), f" {unit}", class_="big")
    return tag("div", tag("h3", title), said, tag("p", note, class_="small"), class_="tile")


def _privacy_tile(private: Standing, leaks: Sequence[LeakFinding]) -> Html:
    shown = max((leak.lower for leak in leaks if leak.lower is not None), default=None)
    below = "no leak test was run" if shown is None else f"leak tests show at least {rounded_down(shown)}"
    if private.refuting:
        said = tag("p", tag("b", "refuted"), class_="big wrong")
        return tag("div", tag("h3", "Privacy"), said, tag("p", below, class_="small"), class_="tile")
    if private.claim is None:
        return _amount_tile("Privacy", "none", "claimed", below)
    claim = private.claim
    number = tag("p", tag("span", "ε at most "), tag("b", rounded_up(claim.value)), class_="big")
    where = f"δ {delta_text(claim.delta)}, one record {NEIGHBOURS[claim.adjacency]}"
    notes = [tag("p", each, class_="small") for each in (where, below)]
    return tag("div", tag("h3", "Privacy"), number, notes, class_="tile")


def _attacks(found: Findings) -> Html:
    rows: list[list[Content]] = [["no attack", *rate_in_line(found.clean), "", ""]]
    for attack in found.attacks:
        broke = ", ".join(f"{name} {number}" for name, number in attack.broke.items())
        took = tag("td", seconds(attack.seconds) if attack.accuracy else "", class_="number")
        rows.append([attack.label, *rate_in_line(attack.accuracy, attack.note), took, broke])
    for name, left in found.worst_by_type.items():
        rows.append([tag("b", f"worst case of {name} alone"), *rate_in_line(left), "", ""])
    if found.worst_case is not None:
        rows.append([tag("b", "worst case: no attack broke it"), *rate_in_line(found.worst_case), "", ""])
    head = ["attack", right("accuracy left, %"), "", right("interval"), right("time"), "points broken by"]
    return table(head, rows)


def _comparison(subjects: Sequence[Subject]) -> Html:
    labels = list(dict.fromkeys(attack.label for subject in subjects for attack in subject.findings.attacks))
    certified = any(subject.findings.certificate for subject in subjects)
    several = len({threat_text(subject.findings.threat) for subject in subjects}) > 1
    private = any(standing(each).claim or each.findings.leaks for each in subjects)
    head: list[Content] = ["model", *(["threat"] if several else [])]
    head += [right("clean"), *map(right, labels), right("worst case, at most")]
    head += [*([right("certified")] if certified else []), *(["privacy"] if private else [])]
    head += [right("size"), right("latency"), "checks"]
    return table(head, [_row(*each, labels, several, certified, private) for each in enumerate(subjects)], "wide")


def _row(
    number: int, subject: Subject, labels: Sequence[str], several: bool, certified: bool, private: bool
) -> list[Content]:
    found = subject.findings
    left = {attack.label: attack.accuracy for attack in found.attacks}
    row: list[Content] = [key(number, subject.name), *([threat_text(found.threat)] if several else [])]
    row += [rate(found.clean), *(rate(left.get(label)) for label in labels), rate(found.worst_case)]
    if certified and found.certificate is not None:
        point = found.certificate.at[0]
        row.append(rate(point.accuracy, f"{found.certificate.norm} {format_radius(point.radius)}"))
    elif certified:
        row.append(DASH)
    if private:
        row.append(_privacy_cell(standing(subject)))
    small = found.cost.made_small
    row.append(amount(*size(found.cost.file_bytes), "" if small is None else f"packed {' '.join(size(small))}"))
    first = next(iter(found.cost.latency), None)
    row.append(amount(f"{1e3 * first.median:.3g}", f"ms / {first.batch_size}") if first else DASH)
    return [*row, state(found)]


def _privacy_cell(private: Standing) -> Html:
    if private.refuting:
        return tag("td", tag("span", "refuted", class_="badge error"))
    if private.claim is None:
        return tag("td", "none", class_="small")
    at = tag("span", f" at δ {delta_text(private.claim.delta)}", class_="small")
    return tag("td", tag("span", f"ε {rounded_up(private.claim.value)}", class_="figure"), at)
