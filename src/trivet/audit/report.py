"""The report: one HTML page about one audited model or several, with nothing loaded from outside and no script."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from trivet.audit import evidence, explanations, privacy_evidence, record, severity_section, verdict
from trivet.audit.html import Content, Html, tag, text
from trivet.audit.subject import Subject
from trivet.audit.table import comparison
from trivet.errors import require

__all__ = ["Subject", "comparison", "page", "render"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(subjects: Sequence[Subject]) -> str:
    """The page about `subjects`: verdicts, claims, privacy, curves, examples, checks, costs, settings, provenance.

    Raises:
        BadValue: no subject.
    """
    require(len(subjects) > 0, "a report needs at least one audited run.")
    title = subjects[0].name if len(subjects) == 1 else f"{len(subjects)} models compared"
    parts = [
        verdict.verdict(subjects),
        record.claims(subjects),
        privacy_evidence.privacy(subjects),
        evidence.curves(subjects),
        evidence.diagnosis(subjects),
        explanations.section_of(subjects),
        severity_section.section_of(subjects),
        evidence.classes(subjects),
        evidence.examples(subjects),
        evidence.checks(subjects),
        record.costs(subjects),
        record.training(subjects),
        record.settings(subjects),
        record.provenance(subjects),
    ]
    return page(title, verdict.masthead(title, subjects), verdict.warnings(subjects), parts)


def page(title: str, masthead: Html, warnings: Html, parts: Sequence[Html]) -> str:
    """A whole page: its head, what to beware of, and those of the sections `parts` that are not empty."""
    shown = [part for part in parts if part]
    body = tag(
        "body",
        tag("header", masthead, _contents(shown)),
        tag("main", warnings, shown),
        tag("footer", "Written by Trivet. Everything on this page is in the page; nothing was loaded from elsewhere."),
    )
    style = resources.files(__package__).joinpath("report.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title}: audit report"),
        Html(f"<style>{style}</style>"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _contents(parts: Sequence[Html]) -> Html:
    """Links to the sections, read off their ids and titles."""
    links: list[Content] = []
    for part in parts:
        anchor = part.split('id="', 1)[1].split('"', 1)[0]
        links.append(tag("a", Html(part.split("<h2>", 1)[1].split("</h2>", 1)[0]), href=f"#{anchor}"))
    return tag("nav", text(links))
