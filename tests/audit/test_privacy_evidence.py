"""The report on privacy: each standing in plain words, and bounds rounded against the one who states them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from defences import QUICK
from torch import nn

from trivet.audit.charts import Bound, Series, bounds, decades, power_of_ten, roc_chart, scatter
from trivet.audit.claims import recheck
from trivet.audit.leak_finding import LeakFinding, LowFprPoint, RocPoint
from trivet.audit.privacy_standing import delta_text, rounded_down, standing
from trivet.audit.report import Subject, comparison, render
from trivet.certify.smoothing import Smoothing
from trivet.claims import Ledger, PrivacyClaim
from trivet.data.dataset import Dataset
from trivet.statistics import Rate

EVENT = {"sampler": "poisson", "rate": 0.0125, "noise_multiplier": 1.23, "noise": "gaussian"}
STAGE = {"event": EVENT, "steps": 4720, "delta": 1e-6, "standing": "private"}


@pytest.fixture(scope="module")
def bare(plain: nn.Module, test_part: Dataset) -> Subject:
    audit = replace(QUICK, points=40, curve=(0.0,), certificate=Smoothing(0.25, n=200), certificate_points=20)
    found, _ = audit.run(plain, test_part, seed=0, name="plain", source="runs/plain")
    return Subject("plain", found)


def claim(subject: Subject, **changes: Any) -> PrivacyClaim:
    made = PrivacyClaim(
        statement="(2.88, 1e-06)-differentially private for each of the 60,000 training records, added or removed.",
        value=2.8712,
        unit="epsilon",
        obtained={"name": "dp_sgd", "accountant": "PLD by dp-accounting 0.6", "lower": 2.8659, "rdp": 3.1121},
        recheck="trivet privacy runs/plain",
        artefact=subject.findings.artefact,
        conditions=("2 other runs used the same records; all together spend epsilon 5.2",),
        made_by="00-fit",
        delta=1e-6,
        adjacency="add_remove",
    )
    made = made.model_copy(update={"obtained": {**made.obtained, "stages": [STAGE]}})
    return made.model_copy(update=changes)


def leak(**changes: Any) -> LeakFinding:
    common: dict[str, Any] = {"label": "One-run audit", "spec": {}, "access": "white box", "trained": 1, "seconds": 1.0}
    return LeakFinding(**{**common, "lower": 1.2399, "delta": 1e-6, "claimed": 2.8712, "planted": 500, **changes})


def attack() -> LeakFinding:
    low = (LowFprPoint(nominal=0.01, fpr=Rate(11, 1000), tpr=Rate(180, 2000)),)
    roc = tuple(RocPoint(fpr=rate, tpr=math.sqrt(rate)) for rate in (0.0, 0.001, 0.01, 0.1, 1.0))
    return leak(label="LiRA", access="black box", lower=None, delta=None, planted=0, low_fpr=low, roc=roc, members=2000)


def shown(subject: Subject, *claims: PrivacyClaim, leaks: tuple[LeakFinding, ...] = (), **changes: Any) -> Subject:
    found = subject.findings.model_copy(update={"leaks": leaks})
    ledger = Ledger(claims)
    recheck(ledger, found)
    return replace(subject, findings=found, claims=ledger.claims, **changes)


def test_a_claim_stands_with_bounds_from_above_and_below_and_what_it_rests_on(bare: Subject) -> None:
    page = render([shown(bare, claim(bare), leaks=(leak(), attack()))])
    for words in (
        "(2.88, 1e-06)-differentially private for each of the 60,000 training records",
        "e^2.88, that is 17.7, times as likely, up to 1e-6, when one training record is added or removed",
        "PLD by dp-accounting 0.6",
        "no account of the same steps can state less than 2.86",
        "at most 3.12 by Rényi divergence",
        "4,720 steps on Poisson samples of rate 0.0125, gaussian noise of 1.23 times the sensitivity",
        "2 other runs used the same records",
        "at least 1.23 with 95 % confidence",
        "below the claim",
        "several records of one person",
        "7.8 to 10.3",
        "really 1.1 % false",
        "leak tests show at least 1.23",
    ):
        assert words in page, words
    assert "<b>refuted</b>" not in page
    assert "The privacy claim of" not in page
    assert "No privacy is claimed" not in page


def test_a_refuted_claim_is_red_before_any_number_and_in_every_table(bare: Subject) -> None:
    broken = shown(bare, claim(bare), leaks=(leak(lower=4.9056),))
    page = render([broken])
    assert page.index("The privacy claim of plain is refuted") < page.index(">Verdict</h2><p")
    assert '<aside class="error" role="alert">' in page
    assert "epsilon is at least 4.9 with 95 % confidence, and 2.88 was claimed" in page
    assert "above the claim" in page
    assert "<b>refuted</b>" in page
    assert "contradicted by One-run audit" in page
    assert comparison([broken])[0]["privacy"] == "refuted"
    assert "refuted" in render([broken, bare])
    (voided,) = standing(broken).voided
    assert standing(broken).claim is None
    assert voided.value == 2.8712


def test_without_private_training_it_says_that_nothing_is_claimed(bare: Subject) -> None:
    page = render([bare])
    assert "No privacy is claimed" in page
    assert "e^" not in page
    assert comparison([bare])[0]["privacy"] == "none"


@pytest.mark.parametrize("where", ["recipe", "history"])
def test_a_method_whose_published_claim_is_void_is_named(bare: Subject, where: str) -> None:
    settings: dict[str, Any] = {"stages": [{"fit": {"rule": {"name": "sidp", "max_grad_norm": 3.1}}}]}
    made = replace(bare, **{where: settings if where == "recipe" else [{"stage": "fit", "settings": settings}]})
    said = "The privacy claim published with SIDP (Davody et al., 2020) is void: the released weights carry no noise."
    assert said in standing(made).reasons
    assert said in render([made])
    assert standing(replace(bare, recipe={"stages": [{"fit": {"rule": "mean_gradient"}}]})).reasons == ()
    both = {"stages": [{"fit": {"rule": "stobatch", "objective": {"name": "stobatch"}}}]}
    assert len(standing(replace(bare, recipe=both)).reasons) == 1


def test_a_fixed_noise_seed_is_called_what_it_is(bare: Subject) -> None:
    history = [{"stage": "fit", "privacy": {**STAGE, "standing": "reproducible, not private"}}]
    assert "This run is reproducible, not private." in render([replace(bare, history=history)])
    assert not standing(replace(bare, history=[{"stage": "fit", "privacy": STAGE}])).reasons


def test_a_claim_with_little_behind_it_and_one_about_other_weights(bare: Subject) -> None:
    sparse = claim(bare, obtained={"name": "dp_sgd", "lower": 0.0, "rdp": math.inf}, conditions=(), adjacency="replace")
    page = render([shown(bare, sparse)])
    assert "exchanged for any other" in page
    assert "Rényi" not in page
    assert "inf" not in page.split('id="privacy"')[1].split('id="curves"')[0].replace("information", "")
    assert standing(shown(bare, claim(bare, artefact="0" * 64))).claim is None


def test_the_table_and_several_models_beside_each_other(bare: Subject) -> None:
    private = shown(bare, claim(bare))
    rows = comparison([private, bare])
    assert [row["privacy"] for row in rows] == ["ε 2.88 at δ 1e-6", "none"]
    page = render([private, bare])
    assert page.count("No privacy is claimed") == 1
    assert "δ 1e-6" in page


def test_bounds_are_rounded_against_the_one_who_states_them() -> None:
    for epsilon in (0.0123456, 0.9999, 1.2399, 4.9056, 12.349, 123.9):
        assert epsilon * 0.99 < float(rounded_down(epsilon)) <= epsilon
    assert (rounded_down(0.0), rounded_down(-1.0), rounded_down(2.5)) == ("0", "0", "2.5")
    assert (delta_text(1e-5), delta_text(2.5e-10), delta_text(0.001)) == ("1e-5", "2.5e-10", "0.001")


def test_the_diagnosis_is_drawn_with_its_rank_correlations(bare: Subject) -> None:
    made = bare.findings.diagnosis
    assert made is not None
    page = render([bare])
    section = page.split('id="diagnosis"')[1].split("</section>")[0]
    assert section.count('class="dot') == 3 * len(made.radius) == 60
    for rho in made.rank_correlation.values():
        assert rho is not None
        assert f"rank correlation {rho:+.2f} over 20 records" in section
    flat = made.model_copy(update={"curvature": None, "rank_correlation": {"gradient": None, "lipschitz": 0.5}})
    page = render([replace(bare, findings=bare.findings.model_copy(update={"diagnosis": flat}))])
    assert "cannot be differentiated twice" in page
    assert "no rank correlation" in page
    without = bare.findings.model_copy(update={"diagnosis": None})
    assert 'id="diagnosis"' not in render([replace(bare, findings=without)])


def test_logarithmic_scales_hold_whole_decades_and_zero_lies_at_their_foot() -> None:
    scale = decades([0.0, 0.02, 30.0])
    assert (scale.first, scale.last) == (-2, 2)
    assert (scale(0.0), scale(1.0), scale(100.0)) == (0.0, 0.5, 1.0)
    assert decades([1e-30, 1.0], most=4).first == -4
    assert decades([]).first < decades([]).last
    assert [power_of_ten(10.0**e) for e in (-3, -1, 0, 1, 12)] == ["10⁻³", "0.1", "1", "10", "10¹²"]


def numbers(chart: str, element: str, attribute: str) -> list[float]:
    return [float(part.split(f'{attribute}="')[1].split('"')[0]) for part in chart.split(f"<{element} ")[1:]]


def test_bounds_are_drawn_in_order_on_one_axis() -> None:
    rows = [Bound("accountant", "at most 3", 0.0, 3.0, [(3.5, "Rényi")]), Bound("test", "at least 1", 1.0, 3.0)]
    chart = bounds([*rows, Bound("worse", "at least 4", 4.0, wrong=True)], 3.0, title="ε")
    nothing, least, most = numbers(chart, "rect", "width")
    assert nothing == 0
    assert most == pytest.approx(4 * least, rel=1e-4)
    assert "wrong" in chart
    assert "claimed" in chart
    assert "claimed" not in bounds(rows[1:], None, title="ε")


def test_the_log_log_curve_of_guessing_is_the_diagonal() -> None:
    rates = [0.001, 0.01, 0.1, 1.0]
    chart = roc_chart([Series("guess", 0, [(rate, rate) for rate in rates])])
    path = chart.split('points="')[1].split('"')[0]
    points = [tuple(map(float, pair.split(","))) for pair in path.split()]
    across = [b[0] - a[0] for a, b in pairwise(points)]
    up = [a[1] - b[1] for a, b in pairwise(points)]
    assert across == pytest.approx([across[0]] * 3, abs=0.11)
    assert up == pytest.approx([up[0]] * 3, abs=0.11)
    assert numbers(scatter([Series("a", 0, [(0.0, 1.0), (0.5, 10.0)])], 0.5, x_title="r", y_title="g"), "circle", "cy")
