"""The rest of the report: claims, cost, training, every setting, and whose numbers these are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trivet.audit import charts
from trivet.audit.cells import DASH, key, right, seconds
from trivet.audit.charts import Series
from trivet.audit.html import Content, Html, facts, section, table, tag
from trivet.audit.subject import Subject
from trivet.claims import Claim

_NOTHING = Html("")


def claims(subjects: Sequence[Subject]) -> Html:
    """Every claim: those that hold, then those that were voided and why."""
    blocks = []
    for number, subject in enumerate(subjects):
        holding = [claim for claim in subject.claims if claim.holds]
        voided = [claim for claim in subject.claims if not claim.holds]
        listed: list[Content] = [tag("ul", [claim_item(claim) for claim in holding], class_="claims")]
        if voided:
            ended = tag("ul", [claim_item(claim) for claim in voided], class_="claims")
            short = len(voided) <= 6
            listed.append(tag("details", tag("summary", f"{len(voided)} voided"), ended, open="" if short else None))
        if subject.claims and len(subjects) > 1:
            counts = tag("span", f" {len(holding)} hold, {len(voided)} voided", class_="small")
            blocks.append(tag("details", tag("summary", key(number, subject.name), counts), *listed, class_="block"))
        elif subject.claims:
            blocks.append(tag("div", *listed))
    if not blocks:
        return _NOTHING
    lead = (
        "Each statement is about exactly these weights and holds under its conditions, which unfold. "
        "What a later step voided is kept, with the reason."
    )
    return section("claims", "Claims", blocks, lead=lead)


def claim_item(claim: Claim) -> Html:
    """One claim, with its conditions folded away."""
    kind = str(getattr(claim, "kind", "claim"))
    settings = json.dumps(claim.obtained, ensure_ascii=False, default=str)
    pairs: list[tuple[str, Content]] = [
        ("check again", tag("code", claim.recheck)),
        ("made by", claim.made_by),
        ("weights", tag("code", claim.artefact[:16])),
    ]
    pairs += [("condition", each) for each in claim.conditions] + [("obtained", tag("code", settings))]
    void = (
        ""
        if claim.voided is None
        else tag("p", f"voided by {claim.voided.stage}: {claim.voided.reason}", class_="reason")
    )
    said = tag("span", claim.statement, class_="statement")
    more = tag("details", tag("summary", tag("span", kind, class_=f"kind {kind}"), said), facts(pairs))
    return tag("li", more, void, class_=None if claim.holds else "voided")


def costs(subjects: Sequence[Subject]) -> Html:
    """Size and speed."""
    sizes = list(dict.fromkeys(each.batch_size for subject in subjects for each in subject.findings.cost.latency))
    counted = ("parameters", "not zero", "bytes", "packed", "zipped", "FLOPs per input", "without zeros")
    shares = ("bits per weight", "idle input channels", "µJ, estimated")
    head: list[Content] = [
        "model",
        *map(right, (*counted, *shares)),
        *(right(f"ms, batch of {each}") for each in sizes),
    ]
    rows = []
    for number, subject in enumerate(subjects):
        cost = subject.findings.cost
        timed = {each.batch_size: each for each in cost.latency}
        sizes_on_disk = (cost.file_bytes, cost.packed_bytes, cost.compressed_bytes)
        numbers = (cost.parameters, cost.nonzero_parameters, *sizes_on_disk, cost.flops, cost.nonzero_flops)
        texts = [None if n is None else f"{n:,}" for n in numbers]
        texts += [None if cost.bits_per_weight is None else f"{cost.bits_per_weight:.3g}"]
        texts += [None if cost.channel_sparsity is None else f"{100 * cost.channel_sparsity:.1f} %"]
        texts += [None if cost.energy is None else f"{cost.energy:.3g}"]
        cells: list[Content] = [key(number, subject.name)]
        cells += [DASH if text is None else tag("td", text, class_="number") for text in texts]
        for each in map(timed.get, sizes):
            spread = tag("span", f" {1e3 * each.low:.3g} to {1e3 * each.high:.3g}", class_="small") if each else ""
            cells.append(tag("td", f"{1e3 * each.median:.3g}", spread, class_="number") if each else DASH)
        rows.append(cells)
    ran = [each for subject in subjects for each in subject.findings.cost.latency]
    where = " · ".join(dict.fromkeys(f"{each.machine}, threads: {each.threads}" for each in ran))
    ways = " or ".join(dict.fromkeys(each.path for each in ran))
    lead = f"Latency: the median in {ways} on {where}, with its quartiles. " if ran else ""
    tables = dict.fromkeys(each.findings.cost.energy_table for each in subjects if each.findings.cost.energy_table)
    lead += f"Energy is estimated by the table {', '.join(tables)}: only ratios mean anything." if tables else ""
    return section("costs", "Cost", table(head, rows), lead=lead)


def training(subjects: Sequence[Subject]) -> Html:
    """The loss over training, stage by stage."""
    figures = []
    for number, subject in enumerate(subjects):
        for stage in dict.fromkeys(line.get("stage", 0) for line in subject.log):
            lines = [line for line in subject.log if line.get("stage", 0) == stage and "loss" in line]
            points = [(float(line.get("epoch", line.get("step", 0))), float(line["loss"])) for line in lines]
            if len(points) < 2:
                continue
            points = charts.thinned(points)
            last, top = max(x for x, _ in points) or 1.0, max(y for _, y in points)
            axis = charts.Axis(last, None, [(x, f"{x:.4g}") for x in charts.nice_ticks(last)])
            ticks = charts.nice_ticks(top, 4)
            ceiling = max(top, ticks[-1]) or 1.0
            series = [Series(subject.name, number, points, marks=False)]
            chart = charts.line_chart(series, axis, x_title="epoch", y_title="loss", top=ceiling, percent=False)
            figures.append(tag("figure", tag("h3", key(number, subject.name), f", stage {stage}"), chart))
            figures += _features(key(number, subject.name), lines)
    lead = "What training minimised, batch by batch, averaged over runs of steps."
    return section("training", "Training", tag("div", figures, class_="grid three"), lead=lead) if figures else _NOTHING


def _features(name: Html, lines: Sequence[Mapping[str, Any]]) -> list[Html]:
    """How far the filters of a patch network have learnt both kinds of features, where the log tells."""
    kinds = {"robust_features": "robust", "non_robust_features": "non-robust"}
    lines = [line for line in lines if kinds.keys() <= line.keys()]
    if len(lines) < 2:
        return []
    series = [
        Series(said, hue, charts.thinned([(float(line["epoch"]), float(line[kind])) for line in lines]), marks=False)
        for hue, (kind, said) in enumerate(kinds.items())
    ]
    last, top = (max(point[place] for each in series for point in each.points) or 1.0 for place in (0, 1))
    axis = charts.Axis(last, None, [(x, f"{x:.4g}") for x in charts.nice_ticks(last)])
    chart = charts.line_chart(series, axis, x_title="epoch", y_title="alignment", top=top, percent=False)
    legend = tag("p", [key(each.hue, each.name) for each in series], class_="legend")
    said = "The best filter's alignment with the feature of its class, averaged over the classes."
    return [tag("figure", tag("h3", name, ", features learnt"), legend, chart, tag("figcaption", said))]


def settings(subjects: Sequence[Subject]) -> Html:
    """Every setting of recipe and audit."""
    blocks = []
    for number, subject in enumerate(subjects):
        parts = [("recipe", subject.recipe), ("audit", subject.findings.settings)]
        for name, value in parts:
            if value:
                written = yaml.safe_dump(
                    json.loads(json.dumps(value, default=str)), sort_keys=False, allow_unicode=True
                )
                blocks.append(
                    tag("details", tag("summary", key(number, subject.name), f": {name}"), tag("pre", written))
                )
    return section("settings", "Settings", blocks)


def provenance(subjects: Sequence[Subject]) -> Html:
    """Whose numbers these are: command, versions, machine, seeds, dates, fingerprints."""
    blocks = []
    for number, subject in enumerate(subjects):
        found = subject.findings
        pairs: list[tuple[str, Content]] = [
            ("weights", tag("code", found.artefact)),
            ("from", found.source),
            ("data", f"{found.data.name}, SHA-256 {found.data.digest}"),
        ]
        pairs += [
            ("seed of the audit", str(found.seed)),
            ("time of the audit", seconds(found.seconds)),
            *session_facts(found.provenance),
        ]
        parts: list[Content] = [tag("h3", key(number, subject.name)) if len(subjects) > 1 else "", facts(pairs)]
        for session in subject.run.get("sessions", ()):
            title = f"trained {session.get('date', '')}, seed {subject.run.get('seed', '')}"
            parts.append(tag("details", tag("summary", title), facts(session_facts(session))))
        blocks.append(tag("div", parts))
    return section("provenance", "Provenance", blocks)


def session_facts(session: Mapping[str, Any]) -> list[tuple[str, Content]]:
    """Where and how something was run."""
    machine, versions = session.get("machine", {}), session.get("versions", {})
    return [
        ("command", tag("code", str(session.get("command", "")))),
        ("date", str(session.get("date", ""))),
        ("machine", ", ".join(f"{key} {value}" for key, value in machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in versions.items())),
    ]
