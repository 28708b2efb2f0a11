"""The report on a policy: one HTML page with the certified return, budget by budget, beside what attacks left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from trivet.audit import charts
from trivet.audit.cells import DASH, key, right, seconds
from trivet.audit.charts import Series
from trivet.audit.evidence import check_table
from trivet.audit.html import Content, Html, facts, section, table, tag, text
from trivet.audit.policy_findings import MeanReturn, PolicyFindings
from trivet.audit.record import claim_item, session_facts
from trivet.audit.report import page
from trivet.claims import Claim
from trivet.training.certify_policy import floored

_NOTHING = Html("")


@dataclass(frozen=True)
class PolicySubject:
    """One audited policy: its findings, the claims of its run, and how it was trained, as a `Subject` has them."""

    findings: PolicyFindings
    claims: Sequence[Claim] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()


def render_policy(subject: PolicySubject) -> str:
    """The page."""
    found = subject.findings
    parts = [
        _returns(found),
        _claims(subject.claims),
        section("checks", "Checks", check_table(found.checks), lead="Numbers that would contradict each other."),
        _training(subject.log),
        _settings(subject),
        _provenance(subject),
    ]
    return page(found.name, _masthead(found), _warnings(found), parts)


def _masthead(found: PolicyFindings) -> Html:
    environment = found.environment
    pairs: list[tuple[str, Content]] = [
        ("environment", f"{environment.get('name') or environment['import']}, at most {environment['horizon']} steps"),
        ("noise", f"sigma {environment['sigma']:g} on each observation, {environment['frames']} frames"),
        ("against", "every shift of an episode's observations within an l_2 budget"),
        ("date", str(found.provenance.get("date", ""))[:10]),
    ]
    return text([tag("p", "Trivet · audit report of a policy", class_="kicker"), tag("h1", found.name), facts(pairs)])


def _warnings(found: PolicyFindings) -> Html:
    boxes = [
        tag("aside", tag("h2", check.title), tag("p", check.meaning), class_=check.severity, role="alert")
        for check in found.flags
    ]
    return text(boxes)


def _returns(found: PolicyFindings) -> Html:
    certified = [(point.budget, point.certified) for point in found.points if point.certified is not None]
    attacked = [(point.budget, point.worst.left) for point in found.points if point.worst is not None]
    series = [
        Series("certified", 0, certified),
        Series(
            "under attack",
            1,
            [(budget, left.mean) for budget, left in attacked],
            [(budget, left.low, left.high) for budget, left in attacked],
        ),
    ]
    last = max((point.budget for point in found.points), default=0.0) or 1.0
    clean = found.clean
    series.append(
        Series(
            "without attack",
            2,
            [(0.0, clean.mean), (last, clean.mean)],
            [(0.0, clean.low, clean.high), (last, clean.low, clean.high)],
            marks=False,
        )
    )
    shown = [each for each in series if each.points]
    top = max(y for each in shown for _, y in each.points) or 1.0
    axis = charts.Axis(last, None, [(x, f"{x:.4g}") for x in charts.nice_ticks(last)])
    chart = charts.line_chart(
        shown, axis, x_title="l_2 budget of an episode", y_title="mean return", top=1.05 * top, percent=False
    )
    legend = tag("p", [key(each.hue, each.name) for each in shown], class_="legend")
    sure = "" if found.confidence_certified is None else f", with confidence {found.confidence_certified:g}"
    caption = f"Certified: no adversary gets below{sure}. Under attack: the worst attack tried; bands are intervals."
    figure = tag("figure", tag("h3", "Return against budget"), legend, chart, tag("figcaption", caption))
    lead = (
        "Mean return per episode. What is certified is a lower bound against every adversary, what an attack left an "
        "upper bound on what the agent keeps; the truth lies between. Intervals are exact."
    )
    return section("returns", "Certified and attacked return", figure, _table(found), lead=lead)


def _table(found: PolicyFindings) -> Html:
    head: list[Content] = ["budget", right("certified"), right("attacked"), right("interval"), right("spent")]
    rows: list[list[Content]] = []
    for point in found.points:
        bound = DASH if point.certified is None else _number(floored(point.certified))
        worst, left = point.worst, point.worst.left if point.worst else found.clean
        spent = DASH if worst is None else _number(f"{worst.spent:.3g}")
        rows.append([f"{point.budget:.4g}", bound, _number(f"{left.mean:.4g}"), _number(_interval(left)), spent])
    return table([*head], rows)


def _number(said: str) -> Html:
    return tag("td", said, class_="number")


def _interval(found: MeanReturn) -> str:
    return f"{found.low:.4g} to {found.high:.4g}"


def _claims(claims: Sequence[Claim]) -> Html:
    if not claims:
        return _NOTHING
    ordered = sorted(claims, key=lambda claim: not claim.holds)
    listed = tag("ul", [claim_item(claim) for claim in ordered], class_="claims")
    lead = "Each statement is about exactly these weights and holds under its conditions, which unfold."
    return section("claims", "Claims", listed, lead=lead)


def _training(log: Sequence[Mapping[str, Any]]) -> Html:
    """The score over training, whichever a stage logged."""
    name = next((name for name in ("return", "score") if any(name in line for line in log)), None)
    points = [(float(line["step"]), float(line[name])) for line in log if name in line] if name else []
    if len(points) < 2:
        return _NOTHING
    last, top = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
    axis = charts.Axis(last, None, [(x, f"{x:.4g}") for x in charts.nice_ticks(last)])
    series = [Series("training", 0, points, marks=False)]
    chart = charts.line_chart(series, axis, x_title="step", y_title=str(name), top=1.05 * top, percent=False)
    lead = "Mean return in noisy episodes while the policy was learnt."
    return section("training", "Training", tag("figure", chart), lead=lead)


def _settings(subject: PolicySubject) -> Html:
    blocks = []
    for name, value in (("recipe", subject.recipe), ("audit", subject.findings.settings)):
        written = yaml.safe_dump(json.loads(json.dumps(value, default=str)), sort_keys=False, allow_unicode=True)
        blocks.append(tag("details", tag("summary", name), tag("pre", written)))
    return section("settings", "Settings", blocks)


def _provenance(subject: PolicySubject) -> Html:
    found = subject.findings
    pairs: list[tuple[str, Content]] = [
        ("weights", tag("code", found.artefact)),
        ("from", found.source),
        ("seed of the audit", str(found.seed)),
        ("time of the audit", seconds(found.seconds)),
        *session_facts(found.provenance),
    ]
    parts: list[Content] = [facts(pairs)]
    for session in subject.run.get("sessions", ()):
        title = f"trained {session.get('date', '')}, seed {subject.run.get('seed', '')}"
        parts.append(tag("details", tag("summary", title), facts(session_facts(session))))
    return section("provenance", "Provenance", parts)
