"""The page: every number on it, nothing loaded from outside, every name escaped; opened in a real browser too."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from defences import QUICK, Defence, same
from torch import Tensor, nn

from trivet.audit.charts import Axis, nice_ticks, radius_axis, thinned
from trivet.audit.claims import claims_from, recheck
from trivet.audit.findings import Findings
from trivet.audit.html import Html, tag, text
from trivet.audit.pictures import LARGEST, data_uri, difference, png
from trivet.audit.report import Subject, comparison, render
from trivet.certify.smoothing import Smoothing
from trivet.claims import Ledger
from trivet.data.dataset import Dataset
from trivet.errors import BadValue

NASTY = "<script>alert('x')</script> & \"co\""


class Page(HTMLParser):
    """Tags and attributes as a browser would see them; complains about tags that do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def subject(plain: nn.Module, test_part: Dataset) -> Subject:
    audit = replace(QUICK, points=100, curve_points=50, certificate=Smoothing(0.25, n=200), certificate_points=20)
    found, examples = replace(audit, latency=(1,)).run(plain, test_part, seed=0, name="plain", source="runs/plain")
    ledger = Ledger()
    ledger.add(*claims_from(found, made_by="audit", recheck="trivet audit runs/plain"))
    recheck(ledger, found)
    ledger.add(*claims_from(found, made_by="audit", recheck="trivet audit runs/plain"))
    log = [{"stage": 0, "step": step, "epoch": step / 10, "loss": 2.0 / (1 + step)} for step in range(500)]
    run = {"seed": 0, "sessions": [found.provenance]}
    return Subject("plain", found, ledger.claims, {"name": "digits-plain", "seed": 0}, run, log, examples)


@pytest.fixture(scope="module")
def masked(plain: nn.Module, test_part: Dataset) -> Subject:
    model = Defence(plain, same, lambda logits: 100 * logits)
    found, examples = QUICK.run(model, test_part, seed=0, name=NASTY, source=NASTY)
    return Subject(NASTY, found, claims_from(found, NASTY, NASTY), {"about": NASTY}, examples=examples)


def test_the_votes_under_noise_are_on_the_page_and_only_where_something_was_sampled(subject: Subject) -> None:
    found = subject.findings.certificate
    assert found is not None
    assert found.shares is not None
    assert sum(found.shares) == 20
    page = Page(render([subject])).text
    assert "Votes under noise" in page
    for number, count in enumerate(found.shares):
        assert f"{count} between {number / 20:.4g} and {(number + 1) / 20:.4g}" in page
    proof = found.model_copy(update={"shares": None})
    without = replace(subject, findings=subject.findings.model_copy(update={"certificate": proof}))
    assert "Votes under noise" not in Page(render([without])).text


def test_every_headline_number_is_on_the_page(subject: Subject) -> None:
    page, found = Page(render([subject])).text, subject.findings
    assert found.worst_case is not None
    assert found.certificate is not None
    for rate in (found.clean, found.worst_case, *(attack.accuracy for attack in found.attacks)):
        assert rate is not None
        assert f"{100 * rate.value:.1f}" in page
        assert f"{100 * rate.interval[0]:.1f} to {100 * rate.interval[1]:.1f}" in page
    assert f"{found.cost.file_bytes:,}" in page
    for claim in subject.claims:
        assert claim.statement in page
    for check in found.checks:
        assert check.title in page
    for words in (
        "upper bound",
        found.artefact,
        found.data.digest,
        "measured again",
        "digits-plain",
        "smoothed classifier",
    ):
        assert words in page
    assert str(found.provenance["versions"]["torch"]) in page


def test_nothing_is_loaded_from_outside_and_no_script_runs(subject: Subject, masked: Subject) -> None:
    page = render([subject, masked])
    for name, attributes in Page(page).tags:
        assert name not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "data", "poster", "srcset", "action"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert len(page) < 1_500_000


def test_names_are_escaped_wherever_they_come_from(masked: Subject) -> None:
    classes = (NASTY, *masked.findings.data.classes[1:])
    data = masked.findings.data.model_copy(update={"name": NASTY, "classes": classes})
    note = masked.findings.model_copy(update={"data": data, "provenance": {"command": NASTY}})
    page = render([replace(masked, findings=note), masked])
    assert "<script" not in page
    assert Page(page).text.count(NASTY) >= 10
    assert not any(tag == "script" for tag, _ in Page(page).tags)


def test_where_masking_is_suspected_the_page_says_so_before_any_number(subject: Subject, masked: Subject) -> None:
    page = Page(render([masked])).text
    assert "Gradient masking is suspected" in page
    assert page.index("Gradient masking is suspected") < page.index("Verdict", page.index("Gradient masking"))
    around = [page[at.start() - 60 : at.start()] for at in re.finditer("robust accuracy", page)]
    assert around
    assert all("Do not quote them as" in before for before in around), "never without the warning"
    assert "suspected" not in Page(render([subject])).text


def test_contradictions_are_announced_as_errors(subject: Subject) -> None:
    (check, *others) = [each for each in subject.findings.checks if each.kind == "consistency"]
    wrong = subject.findings.model_copy(update={"checks": (check.model_copy(update={"raised": True}), *others)})
    assert "Numbers contradict each other" in render([replace(subject, findings=wrong)])


def test_a_bare_model_from_elsewhere_has_a_page_too(subject: Subject) -> None:
    """No recipe, log, claims, examples, certificate, curve, latency, and an attack that could not run."""
    attack = subject.findings.attacks[0].model_copy(update={"accuracy": None, "note": "not possible here"})
    changes = {"attacks": (attack,), "worst_case": None, "worst_by_class": (), "curve": None, "certificate": None}
    cost = subject.findings.cost.model_copy(update={"latency": ()})
    bare = subject.findings.model_copy(update={**changes, "cost": cost})
    for page in (render([Subject("bare", bare)]), render([Subject("bare", bare), subject])):
        assert "not possible here" in Page(page).text
    assert comparison([Subject("bare", bare)])[0]["worst case"] is None


def test_no_subject_is_refused() -> None:
    with pytest.raises(BadValue, match="at least one"):
        render([])


def test_the_table_has_the_same_columns_for_every_model(subject: Subject, masked: Subject) -> None:
    rows = comparison([subject, masked])
    assert [list(row) for row in rows] == [list(rows[0])] * 2
    assert rows[0]["clean"] == pytest.approx(100 * subject.findings.clean.value, abs=0.01)
    assert rows[0]["threat"] == "linf 0.1"
    (certified,) = (column for column in rows[0] if column.startswith("certified, L2 "))
    assert (rows[0]["flags"], rows[1][certified]) == ("", None)
    assert "zero_gradients" in rows[1]["flags"]
    assert list(rows[0])[-1] == "flags"


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed, and CHROMIUM is not set")
    return found


@pytest.mark.slow
def test_a_browser_shows_the_numbers_and_asks_for_nothing(subject: Subject, masked: Subject, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render([subject, masked]))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    shown = subprocess.run([browser(), *options], capture_output=True, text=True, timeout=120, check=True)
    words = Page(shown.stdout).text
    assert subject.findings.worst_case is not None
    for rate in (subject.findings.clean, subject.findings.worst_case):
        assert f"{100 * rate.value:.1f}" in words
    assert NASTY in words
    assert "CONSOLE" not in shown.stderr, "no blocked resource, no script error"


def decoded(content: bytes) -> Tensor:
    """[H, W, C] uint8 of an 8-bit PNG without row filters: an independent reader."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {0: 1, 2: 3}[colour]
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, -1)
    assert depth == 8
    assert bool((rows[:, 0] == 0).all())
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_hold_the_pixels(channels: int) -> None:
    image = torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decoded(png(image)), (255 * image).round().to(torch.uint8).movedim(0, -1))


def test_pictures_are_readable_by_an_imaging_library() -> None:
    image_module = pytest.importorskip("PIL.Image")
    import io

    image = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    opened = image_module.open(io.BytesIO(png(image)))
    assert (opened.size, opened.mode) == ((6, 4), "RGB")
    assert opened.getpixel((5, 3)) == tuple((255 * image[:, 3, 5]).round().int().tolist())


def test_large_pictures_are_made_small() -> None:
    import base64

    uri = data_uri(torch.rand(3, 300, 200))
    height, width, _ = decoded(base64.b64decode(uri.split(",")[1])).shape
    assert (height, width) == (LARGEST, 64)


def test_the_largest_change_becomes_black_or_white() -> None:
    clean = torch.full((1, 2, 2), 0.5)
    changed, factor = difference(clean, clean + torch.tensor([[[0.1, -0.05], [0.0, 0.0]]]))
    assert factor == pytest.approx(5.0, rel=1e-5)
    assert changed.flatten().tolist() == pytest.approx([1.0, 0.25, 0.5, 0.5], abs=1e-5)
    assert difference(clean, clean)[1] == 1.0


def test_a_radius_far_beyond_the_others_goes_behind_a_break() -> None:
    axis = radius_axis([0.0, 0.1, 0.2, 1.0], str)
    assert (axis.last, axis.behind) == (0.2, 1.0)
    assert axis(0.0) < axis(0.1) < axis(0.2) < axis(1.0)
    assert axis(0.2) - axis(0.1) == pytest.approx(axis(0.1) - axis(0.0))
    assert radius_axis([0.0, 0.1, 0.2], str).behind is None
    assert Axis(0.0, None, ())(0.0) > 0


@pytest.mark.parametrize("last", [1e-3, 0.2, 0.7, 1.0, 2.3, 64.0, 1e4])
def test_ticks_are_few_round_and_within(last: float) -> None:
    ticks = nice_ticks(last)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0.0
    assert 0.55 * last <= ticks[-1] <= last * (1 + 1e-9)


def test_thinning_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:50], 100) == points[:50]


def test_only_what_is_marked_as_markup_is_kept() -> None:
    assert text(["<b>", Html("<i>")]) == "&lt;b&gt;<i>"
    assert tag("a", "x", href='"><script>', class_="c", title=None) == (
        '<a href="&quot;&gt;&lt;script&gt;" class="c">x</a>'
    )


def test_findings_that_were_read_back_make_the_same_page(subject: Subject, tmp_path: Path) -> None:
    subject.findings.save(tmp_path / "audit.json")
    loaded = replace(subject, findings=Findings.load(tmp_path / "audit.json"))
    assert render([loaded]) == render([subject])
