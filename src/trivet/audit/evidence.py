"""The middle of the report: curves, classes, pictures, and whether the numbers can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trivet.audit import charts
from trivet.audit.cells import key, right, state
from trivet.audit.charts import Series
from trivet.audit.findings import Check, DiagnosisFinding
from trivet.audit.html import Content, Html, section, table, tag
from trivet.audit.labels import in_pixels
from trivet.audit.pictures import data_uri, difference
from trivet.audit.subject import Subject
from trivet.certify.curves import format_radius

_NOTHING = Html("")
_MOST_CLASSES = 20


def curves(subjects: Sequence[Subject]) -> Html:
    """Accuracy over the radius: what attacks leave, and what is proved."""
    figures = [*_attacked(subjects), *_certified(subjects), *_votes(subjects)]
    return section("curves", "Over the radius", tag("div", figures, class_="grid")) if figures else _NOTHING


def _attacked(subjects: Sequence[Subject]) -> list[Html]:
    """One reliability curve for each geometry, with all its models."""
    figures = []
    for name in dict.fromkeys(subject.findings.threat.get("name") for subject in subjects):
        shown = [
            (number, subject, curve)
            for number, subject in enumerate(subjects)
            if (curve := subject.findings.curve) is not None and subject.findings.threat.get("name") == name
        ]
        if not shown:
            continue
        series = [
            Series(
                subject.name,
                number,
                [(point.eps, point.accuracy.value) for point in curve.points],
                [(point.eps, *point.accuracy.interval) for point in curve.points],
            )
            for number, subject, curve in shown
        ]
        radii = {0.0} | {x for each in series for x, _ in each.points}
        eps = {float(subject.findings.threat.get("eps", 0.0)) for _, subject, _ in shown}
        chart = charts.line_chart(
            series,
            charts.radius_axis(sorted(radii), in_pixels),
            x_title=f"{name} radius",
            y_title="accuracy left",
            marker=(eps.pop(), "threat") if len(eps) == 1 else None,
        )
        curve = shown[0][2]
        trials = sorted({each.points[0].accuracy.trials for _, _, each in shown if each.points})
        caption = (
            f"Left by the worse of {' and '.join(curve.attacks)} on {' or '.join(map(str, trials))} points: "
            "an upper bound at every radius. Bands are intervals. Behind a break: any image at all."
        )
        figures.append(_figure("Under attack", chart, caption, [each[:2] for each in shown], len(subjects)))
    return figures


def _certified(subjects: Sequence[Subject]) -> list[Html]:
    """One curve of certified accuracy for each norm, with all its models."""
    figures = []
    proved = [(n, s, found) for n, s in enumerate(subjects) if (found := s.findings.certificate) is not None]
    for norm in dict.fromkeys(found.norm for _, _, found in proved):
        shown = [each for each in proved if each[2].norm == norm]
        series = [
            Series(
                subject.name,
                number,
                [(point.radius, point.accuracy.value) for point in found.curve],
                [(point.radius, *point.accuracy.interval) for point in found.curve],
                marks=False,
            )
            for number, subject, found in shown
        ]
        last = max(x for each in series for x, _ in each.points) or 1.0
        axis = charts.Axis(last, None, [(x, f"{x:.4g}") for x in charts.nice_ticks(last)])
        chart = charts.line_chart(series, axis, x_title=f"{norm} radius", y_title="certified accuracy")
        parts: list[Html] = []
        for _, subject, found in shown:
            who = f"{subject.name}: " if len(subjects) > 1 else ""
            sure = f", each certificate with confidence {1 - found.alpha:g}" if found.alpha else ""
            said = (
                f"{who}{found.label} on {found.abstained.trials} points{sure}; average radius "
                f"{format_radius(found.average_radius)}, abstained on {100 * found.abstained.value:.1f} %."
            )
            parts.append(tag("span", said))
        figures.append(_figure("Certified", chart, parts, [each[:2] for each in shown], len(subjects)))
    return figures


def _votes(subjects: Sequence[Subject]) -> list[Html]:
    """How the noisy copies voted, for each model that was certified by sampling."""
    figures = []
    for number, subject in enumerate(subjects):
        found = subject.findings.certificate
        if found is None or found.shares is None:
            continue
        chart = charts.histogram(found.shares, number, x_title="share of votes for the class", y_title="points")
        caption = (
            "Points by the share of noisy copies that voted for the class under test: what the average radius hides. "
            "At one half or below nothing is certified; only shares near 1 reach far."
        )
        figures.append(_figure("Votes under noise", chart, caption, [(number, subject)], len(subjects)))
    return figures


def _figure(title: str, chart: Html, caption: Content, shown: Sequence[tuple[int, Subject]], of: int) -> Html:
    legend = tag("p", [key(number, subject.name) for number, subject in shown], class_="legend") if of > 1 else ""
    return tag("figure", tag("h3", title), legend, chart, tag("figcaption", caption))


_MEASURES = {
    "gradient": ("Slope", "norm of the input gradient"),
    "curvature": ("Curvature", "largest eigenvalue of the input Hessian"),
    "lipschitz": ("Local Lipschitz constant", "change of the logits per change of a pixel"),
}


def diagnosis(subjects: Sequence[Subject]) -> Html:
    """What the network does near each certified record, against how far the record is certified."""
    found = [(n, s, made) for n, s in enumerate(subjects) if (made := s.findings.diagnosis) is not None and made.radius]
    figures = []
    for norm in dict.fromkeys(made.norm for _, _, made in found):
        shown = [each for each in found if each[2].norm == norm]
        figures += [_scattered(norm, name, shown, len(subjects)) for name in _MEASURES]
    lead = (
        "Wu et al. (TMLR 2024): a point for each of the first certified records, at radius 0 where nothing or a wrong "
        "label was certified. All three are about the network itself, before smoothing; curvature and Lipschitz "
        "constant are what a search found, so no less. Kinks between the pieces of a ReLU network have no curvature."
    )
    if not figures:
        return _NOTHING
    return section("diagnosis", "Near each certified record", tag("div", figures, class_="grid three"), lead=lead)


def _scattered(norm: str, measure: str, shown: Sequence[tuple[int, Subject, DiagnosisFinding]], of: int) -> Html:
    title, what = _MEASURES[measure]
    drawn = [(number, subject, made, getattr(made, measure)) for number, subject, made in shown]
    drawn = [each for each in drawn if each[3] is not None]
    if not drawn:
        return tag("figure", tag("h3", title), tag("figcaption", "The model cannot be differentiated twice."))
    series = [Series(s.name, n, list(zip(made.radius, values, strict=True))) for n, s, made, values in drawn]
    last = max(x for each in series for x, _ in each.points) or 1.0
    chart = charts.scatter(series, last, x_title=f"certified {norm} radius", y_title=what)
    said = []
    for _, subject, made, values in drawn:
        who, rho = f"{subject.name}: " if of > 1 else "", made.rank_correlation.get(measure)
        ranks = "no rank correlation, one of both is constant" if rho is None else f"rank correlation {rho:+.2f}"
        said.append(tag("span", f"{who}{ranks} over {len(values)} records."))
    caption = [tag("span", f"Up: {what}."), *said]
    return _figure(title, chart, caption, [each[:2] for each in drawn], of)


def classes(subjects: Sequence[Subject]) -> Html:
    """Accuracy of each class, without attack and in the worst case."""
    figures = []
    for number, subject in enumerate(subjects):
        found = subject.findings
        if not found.worst_by_class:
            continue
        triples = sorted(
            zip(found.data.classes, found.clean_by_class, found.worst_by_class, strict=True),
            key=lambda each: each[2].value if len(found.data.classes) > _MOST_CLASSES else 0.0,
        )[:_MOST_CLASSES]
        names, clean, worst = zip(*triples, strict=True)
        chart = charts.class_bars(
            names, [rate.value for rate in clean], [(rate.value, *rate.interval) for rate in worst], number
        )
        note = (
            f"The {len(names)} weakest of {len(found.data.classes)} classes."
            if len(names) < len(found.data.classes)
            else ""
        )
        figures.append(
            tag(
                "figure",
                tag("h3", key(number, subject.name)) if len(subjects) > 1 else "",
                chart,
                tag("figcaption", note) if note else "",
            )
        )
    if not figures:
        return _NOTHING
    lead = "Pale: without attack. Full: what the worst case leaves, in %, with its interval."
    return section("classes", "Class by class", tag("div", figures, class_="grid"), lead=lead)


def examples(subjects: Sequence[Subject]) -> Html:
    """Pictures of attacks that succeeded."""
    blocks = [
        tag("div", tag("h3", key(number, subject.name)) if len(subjects) > 1 else "", _pictures(subject))
        for number, subject in enumerate(subjects)
        if subject.examples and len(subject.examples["index"])
    ]
    lead = (
        "Records that were labelled correctly, and images near them that were not. Differences are amplified. Why, "
        "where it is shown: what each pixel adds to the logit of the right class (light) or takes from it (dark)."
    )
    return section("examples", "Adversarial examples", blocks, lead=lead) if blocks else _NOTHING


def _pictures(subject: Subject) -> Html:
    e, names = subject.examples, subject.findings.data.classes
    columns = []
    for row in range(len(e["index"])):
        changed, factor = difference(e["clean"][row], e["adversarial"][row])
        before, after = (names[int(e[key][row])] for key in ("label", "adversarial_prediction"))
        pictures = [
            tag("img", src=data_uri(image), alt=alt)
            for image, alt in (
                (e["clean"][row], f"record {int(e['index'][row])}, labelled {before}"),
                (e["adversarial"][row], f"the same, attacked, labelled {after}"),
                (changed, f"difference, amplified {factor:.2g} times"),
            )
        ]
        for what, whose in (("clean_attribution", "record"), ("adversarial_attribution", "attacked record")):
            if what in e:
                shown, _ = difference(torch.zeros_like(e[what][row]), e[what][row])
                pictures.append(tag("img", src=data_uri(shown), alt=f"attribution of the {whose} to {before}"))
        said = tag(
            "figcaption", tag("b", before), " → ", tag("b", after), tag("span", f"diff x{factor:.2g}", class_="small")
        )
        columns.append(tag("figure", pictures, said))
    titles = ["clean", "attacked", "difference", *(["why", "why, attacked"] if "clean_attribution" in e else [])]
    heads = tag("div", [tag("span", each) for each in titles], class_="heads", aria_hidden="true")
    return tag("div", tag("div", heads, columns, class_="pictures"), class_="scroll")


def checks(subjects: Sequence[Subject]) -> Html:
    """Every check with its rule and what was measured."""
    blocks = []
    for number, subject in enumerate(subjects):
        inner = check_table(subject.findings.checks)
        if len(subjects) > 1:
            summary = tag("summary", key(number, subject.name), " ", state(subject.findings))
            inner = tag("details", summary, inner, open="" if subject.findings.flags else None)
        blocks.append(inner)
    lead = (
        "Signs that attacks were hindered rather than withstood, and numbers that contradict each other. "
        "One raised is reason to doubt; none raised is no proof."
    )
    return section("checks", "Checks", blocks, lead=lead)


def check_table(checks: Sequence[Check]) -> Html:
    """A row for each check, those that were raised first."""
    rows = [
        [check.title, _raised(check), check.rule, _measured(check.measured)]
        for check in sorted(checks, key=lambda check: not check.raised)
    ]
    return table(["check", "", "raised when", right("measured")], rows, "checks")


def _raised(check: Check) -> Html:
    if check.raised is None:
        return tag("td", tag("span", "not applicable", class_="badge"))
    kind = {"error": "error", "warning": "warning", "note": "note"}[check.severity] if check.raised else "ok"
    return tag("td", tag("span", "raised" if check.raised else "no", class_=f"badge {kind}"))


def _measured(measured: Mapping[str, float]) -> Html:
    parts: list[Content] = []
    for name, value in measured.items():
        parts.append(tag("span", f"{name} ", tag("b", f"{value:.4g}")))
    return tag("td", parts, class_="number measured")
