"""The report on privacy: what is claimed, from above and from below, what it rests on, and what it does not cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trivet.audit import charts
from trivet.audit.cells import DASH, interval, key, right
from trivet.audit.charts import Bound, Series
from trivet.audit.html import Content, Html, facts, section, table, tag, text
from trivet.audit.leak_finding import LeakFinding, LowFprPoint
from trivet.audit.privacy_standing import Standing, rounded_down, standing
from trivet.audit.subject import Subject
from trivet.claims import PrivacyClaim
from trivet.training.private_stage import NEIGHBOURS, delta_text, rounded_up

_NOTHING = Html("")
_SAMPLERS = {"poisson": "Poisson samples of rate {rate:.4g}", "shuffled": "shuffled batches, {share:.0f} to a pass"}
_NOT_COVERED = (
    "several records of one person: k of them are protected with k times this epsilon only, and a larger delta",
    "what can be learned about people from everybody else's records",
    "settings chosen by looking at results on the same records, unless a condition counts those runs",
    "weights or data the training started from, whatever they were made of",
    "the records this audit was made on, of which this page shows pictures",
    "errors in the code or the arithmetic: leak tests look for them, and one that finds nothing proves nothing",
)


def warnings(subject: Subject) -> Html:
    """The red box of a model whose privacy claim a leak test refutes."""
    refuting = standing(subject).refuting
    if not refuting:
        return _NOTHING
    items = [
        tag(
            "li",
            tag("b", leak.label),
            f": epsilon is {_at_least(leak)}, and {rounded_up(leak.claimed or 0.0)} was claimed.",
        )
        for leak in refuting
    ]
    advice = (
        "Either the training, its account or the test is wrong. Until it is known which, treat the weights as if they "
        "were the training records."
    )
    title = f"The privacy claim of {subject.name} is refuted"
    return tag("aside", tag("h2", title), tag("ul", items), tag("p", advice), class_="error", role="alert")


def privacy(subjects: Sequence[Subject]) -> Html:
    """The section, with one block for each model; one line for those that claim and test nothing."""
    blocks = []
    for number, subject in enumerate(subjects):
        heading = tag("h3", key(number, subject.name)) if len(subjects) > 1 else _NOTHING
        blocks.append(tag("div", heading, _block(subject, len(subjects) > 1), class_="private"))
    lead = (
        "Epsilon bounds how much likelier any release can become by one record. The accountant proves it from above; "
        "attacks on models trained the same way bound it from below. A lower bound that stays small proves nothing."
    )
    return section("privacy", "Privacy", *blocks, lead=lead)


def _block(subject: Subject, folded: bool) -> Html:
    found, leaks = standing(subject), subject.findings.leaks
    parts: list[Content] = [_said(found)]
    figures = [*_bounds(found, leaks), *_roc(leaks)]
    if figures:
        parts.append(tag("div", figures, class_="grid"))
    if leaks:
        parts.append(_leaks(leaks))
    if found.claim is not None:
        terms = _terms(found.claim)
        summary = tag("summary", "how epsilon was computed, what it rests on, what it does not cover")
        parts.append(tag("details", summary, *terms) if folded else tag("div", *terms))
    return text(parts)


def _said(found: Standing) -> Html:
    """The standing in plain sentences, the most important first."""
    lines = []
    if found.refuting:
        worst = max(found.refuting, key=lambda leak: leak.lower or 0.0)
        lines.append(
            f"Refuted: {worst.label} shows an epsilon of {_at_least(worst)}, above the claimed "
            f"{rounded_up(worst.claimed or 0.0)}."
        )
    if found.claim is not None:
        epsilon = found.claim.value
        times = f"e^{rounded_up(epsilon)}" + (f", that is {rounded_up(math.exp(epsilon))}," if epsilon <= 10 else "")
        lines.append(
            f"{found.claim.statement} The unit is one record: whatever the model is used for, no outcome becomes more "
            f"than {times} times as likely, up to {delta_text(found.claim.delta)}, when one training record is "
            f"{NEIGHBOURS[found.claim.adjacency]}."
        )
    else:
        lines.append("No privacy is claimed: the training records may be recognisable in the model and its answers.")
    lines += found.reasons
    lines += [f"Ended: {_sentence(claim)}" for claim in found.voided]
    return text([tag("p", line, class_="standing" if number == 0 else None) for number, line in enumerate(lines)])


def _sentence(claim: PrivacyClaim) -> str:
    reason = f" ({claim.voided.stage}: {claim.voided.reason})" if claim.voided else ""
    return claim.statement.rstrip(".") + reason + "."


def _bounds(found: Standing, leaks: Sequence[LeakFinding]) -> list[Html]:
    """Accountant and leak tests on one axis."""
    claim, rows = found.claim, []
    claimed = claim.value if claim is not None else next((leak.claimed for leak in leaks if leak.claimed), None)
    if claim is not None:
        renyi = _finite(claim.obtained.get("rdp"))
        marks = [(renyi, "by Rényi divergence")] if renyi is not None else []
        said = f"at most {rounded_up(claim.value)}"
        rows.append(Bound("accountant", said, 0.0, claim.value, marks))
    rows += [
        Bound(leak.label, _at_least(leak), leak.lower, None if leak.contradicts else claimed, wrong=leak.contradicts)
        for leak in leaks
        if leak.lower is not None
    ]
    if not rows:
        return []
    deltas = {claim.delta} if claim is not None else {leak.delta for leak in leaks if leak.lower is not None}
    at = f" at δ {delta_text(deltas.pop() or 0)}" if len(deltas) == 1 else ""
    caption = "Filled: epsilon is no smaller, if the test is right. Thin: what stays possible. "
    if any(row.marks for row in rows):
        caption += "Ring: the accountant's cross-check by Rényi divergence, a looser bound."
    chart = charts.bounds(rows, claimed, title=f"ε{at}")
    return [tag("figure", tag("h3", "From above and from below"), chart, tag("figcaption", caption))]


def _at_least(leak: LeakFinding) -> str:
    return f"at least {rounded_down(leak.lower or 0.0)} with {100 * leak.confidence:g} % confidence"


def _roc(leaks: Sequence[LeakFinding]) -> list[Html]:
    """Membership attacks, both rates logarithmic."""
    drawn = [(number, leak) for number, leak in enumerate(leaks) if len(leak.roc) > 1]
    if not drawn:
        return []
    series = [Series(leak.label, number, [(at.fpr, at.tpr) for at in leak.roc]) for number, leak in drawn]
    legend = tag("p", [key(number, leak.label) for number, leak in drawn], class_="legend")
    caption = "Up: true positive rate. Dotted: guessing. What matters is the left, where false alarms are rare."
    heading = tag("h3", "Membership attacks")
    return [tag("figure", heading, legend, charts.roc_chart(series), tag("figcaption", caption))]


def _leaks(leaks: Sequence[LeakFinding]) -> Html:
    """A row for each leak test."""
    asked = sorted({each.nominal for leak in leaks for each in leak.low_fpr}, reverse=True)
    head: list[Content] = ["leak test", "attacker sees", right("ε at least")]
    head += [right(f"found at {100 * rate:g} % false alarms, %") for rate in asked]
    head.append("know before believing")
    rows = []
    for leak in leaks:
        low = {each.nominal: each for each in leak.low_fpr}
        seen = "outputs" if leak.access == "black box" else "outputs and weights"
        row: list[Content] = [leak.label, seen, _lower(leak)]
        row += [_found(low.get(rate)) for rate in asked]
        rows.append([*row, tag("td", _notes(leak), class_="notes")])
    return table(head, rows, "leaks")


def _lower(leak: LeakFinding) -> Html:
    if leak.lower is None:
        return tag("td", tag("span", "bounds nothing", class_="badge"), class_="number")
    lower, sure = tag("span", rounded_down(leak.lower), class_="figure"), f"{100 * leak.confidence:g} % confidence"
    notes = [tag("span", each, class_="small") for each in (sure, f"δ {delta_text(leak.delta or 0)}")]
    said = "above the claim" if leak.contradicts else "nothing claimed" if leak.claimed is None else "below the claim"
    badge = tag("span", said, class_="badge error" if leak.contradicts else "badge")
    return tag("td", lower, notes, badge, class_="number stacked")


def _found(point: LowFprPoint | None) -> Html:
    if point is None:
        return DASH
    real = tag("span", f"really {100 * point.fpr.value:.2g} % false", class_="small")
    found, spread = f"{100 * point.tpr.value:.2f}", tag("span", interval(point.tpr), class_="small")
    return tag("td", tag("span", found, class_="figure"), spread, real, class_="number stacked")


def _notes(leak: LeakFinding) -> list[Content]:
    said = [f"{leak.trained:,} model{'s' * (leak.trained != 1)} trained for it"]
    said += [f"{leak.planted:,} planted canaries, {leak.canaries}"] if leak.planted else []
    if leak.members:
        said.append(f"{leak.members:,} members and {leak.others:,} others attacked")
    if leak.gaussian_lower is not None:
        said.append(f"{rounded_down(leak.gaussian_lower)} if the mechanism is Gaussian, which is assumed")
    return [tag("span", each) for each in (*said, *leak.notes)]


def _terms(claim: PrivacyClaim) -> list[Html]:
    """The account, the conditions, and what no epsilon covers."""
    held = tag("div", tag("h4", "Conditions"), tag("ul", [tag("li", each) for each in claim.conditions]))
    uncovered = tag("div", tag("h4", "Not covered"), tag("ul", [tag("li", each) for each in _NOT_COVERED]))
    return [_account(claim), tag("div", held if claim.conditions else "", uncovered, class_="grid terms")]


def _account(claim: PrivacyClaim) -> Html:
    """Where the claimed epsilon comes from."""
    obtained = claim.obtained
    pairs: list[tuple[str, Content]] = [("made by", claim.made_by)]
    pairs += [("mechanism", _mechanism(stage)) for stage in obtained.get("stages", ()) if "event" in stage]
    if "accountant" in obtained:
        pairs.append(("computed with", str(obtained["accountant"])))
    lower, renyi = (_finite(obtained.get(name)) for name in ("lower", "rdp"))
    if lower is not None:
        pairs.append(("tightness", f"no account of the same steps can state less than {rounded_down(lower)}"))
    if renyi is not None:
        pairs.append(("cross-check", f"at most {rounded_up(renyi)} by Rényi divergence, computed independently"))
    pairs.append(("check again", tag("code", claim.recheck)))
    return facts(pairs)


def _mechanism(stage: Mapping[str, Any]) -> str:
    event = stage["event"]
    rate = float(event.get("rate", 1.0))
    drawn = _SAMPLERS.get(str(event.get("sampler")), "").format(rate=rate, share=1 / rate)
    noise = str(event.get("noise", "gaussian")).replace("_", " ")
    scale = f"{event.get('noise_multiplier', 0):.4g} times the sensitivity"
    return f"{stage.get('steps', 0):,} steps on {drawn}, {noise} noise of {scale}"


def _finite(value: Any) -> float | None:
    """A number that was computed; the accountant writes inf, 0 or nothing where it was not."""
    return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else None
