"""A policy's recipe from end to end: train, certify, audit, claims, report; and contradictions turn the audit red."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trivet import api, cli
from trivet.audit.policy_audit import PolicyAudit, checks, policy_claims, void_contradicted
from trivet.audit.policy_findings import MeanReturn, PolicyAttack, PolicyFindings, PolicyPoint
from trivet.audit.policy_report import PolicySubject, render_policy
from trivet.certify.policy_smoothing import PolicySmoothing
from trivet.claims import AccuracyClaim, AttackClaim, CertificateClaim, Ledger
from trivet.control.cartpole import CartPole
from trivet.control.episodes import View, play
from trivet.control.greedy_flip import GreedyFlip
from trivet.control.steady_push import SteadyPush
from trivet.errors import BadValue, TrivetError
from trivet.methods import build, spec_of
from trivet.models.mlp import mlp
from trivet.recipes.plan import plan
from trivet.recipes.recipe import load
from trivet.runs import Run
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf

RECIPE = """\
name: tiny-policy
about: A policy for tests.
environment: {name: cartpole, frames: 2, sigma: 0.3, horizon: 30}
model: {name: mlp, hidden: []}
threat: {name: l2, eps: 0.2}
stages:
  - cross_entropy_search: {iterations: 2, population: 8, elite: 3, episodes: 3}
  - certify_policy: {episodes: 200, budgets: [0.1, 0.2]}
audit:
  attacks: [{name: steady_push, draws: 2}, {name: greedy_flip, draws: 2, step: 0.1}]
  budgets: [0.1, 0.2]
  episodes: 20
  clean_episodes: 50
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    (folder / "tiny.yaml").write_text(RECIPE)
    api.train_model(folder / "tiny.yaml", out=folder / "run")
    api.audit_policy(folder / "run")
    return folder / "run"


def shell(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trivet", "--no-keep-memory", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_has_claims_of_what_is_certified_attacked_and_clean(run: Path) -> None:
    claims = {type(claim): claim for claim in Ledger.load(run / "claims.json").holding}
    found = PolicyFindings.load(run / "audit.json")
    assert set(claims) == {CertificateClaim, AttackClaim, AccuracyClaim}
    assert claims[CertificateClaim].value <= claims[AttackClaim].interval[1]  # type: ignore[index]
    assert claims[AccuracyClaim].value == found.clean.mean
    assert claims[AttackClaim].value == found.points[-1].worst.left.mean  # type: ignore[union-attr]
    assert {claim.artefact for claim in claims.values()} == {found.artefact}
    assert [point.budget for point in found.points] == [0.0, 0.1, 0.2]
    assert found.points[2].certified == claims[CertificateClaim].value
    assert found.points[0].attacks == ()
    assert len(found.points[1].attacks) == 2
    assert found.confidence_certified == 0.95
    assert not found.flags


def test_what_was_audited_is_the_smoothed_agent(run: Path) -> None:
    """The clean mean, played again with the weights on disk and their noise."""
    opened = Run.open(run)
    environment = opened.plan.environment
    assert environment is not None
    model = opened.model(environment)
    again = play(environment, model, 50, seed=0, purpose="policy audit, clean").returns
    assert PolicyFindings.load(run / "audit.json").clean.mean == float(again.mean())
    returns = play(environment, model, 200, seed=0, purpose="certification").returns
    proved = PolicySmoothing(0.3, environment.returns, episodes=200).certify(returns)
    assert opened.claims.holding[0].value == proved.mean(0.2)


def test_auditing_again_changes_nothing_and_supersedes_the_old_claims(run: Path, monkeypatch: Any, capsys: Any) -> None:
    before = PolicyFindings.load(run / "audit.json")
    assert shell(monkeypatch, "audit", run, "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert after["points"][1]["certified"] == before.points[1].certified
    assert [each["left"]["mean"] for each in after["points"][2]["attacks"]] == [
        each.left.mean for each in before.points[2].attacks
    ]
    assert len(Ledger.load(run / "claims.json").holding) == 3


def test_the_terminal_shows_a_row_for_each_budget(run: Path, monkeypatch: Any, capsys: Any) -> None:
    assert shell(monkeypatch, "audit", run) == 0
    said = capsys.readouterr().out
    assert "certified" in said
    assert "report.html" in said
    assert len([line for line in said.splitlines() if line.strip().startswith("0.")]) == 3


def test_the_report_shows_curve_claims_and_conditions(run: Path, tmp_path: Path) -> None:
    page = api.write_report([run], tmp_path / "page.html").read_text()
    for words in (
        "Certified and attacked return",
        "certified: ",
        "under attack: ",
        "N(0, 0.3^2)",
        "sigma 0.3",
        "Claims",
    ):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert page == (run / "report.html").read_text()


def test_a_report_of_an_agent_without_certificate_says_so(run: Path) -> None:
    found = PolicyFindings.load(run / "audit.json")
    bare = found.model_copy(
        update={
            "confidence_certified": None,
            "points": tuple(point.model_copy(update={"certified": None}) for point in found.points),
        }
    )
    page = render_policy(PolicySubject(bare))
    assert "with confidence" not in page
    assert "Claims" not in page


def test_policies_and_classifiers_are_told_apart(run: Path, monkeypatch: Any, capsys: Any) -> None:
    assert api.is_policy(run)
    assert not api.is_policy("digits-plain")
    with pytest.raises(TrivetError, match="is a policy, and cannot be set beside models"):
        api.compare_runs([run])
    with pytest.raises(TrivetError, match="is for a policy in an environment, and there are no records"):
        api.audit_model(run)
    assert shell(monkeypatch, "audit", run, "--data", "digits") == 2
    assert "audit it without --recipe, --data and --out" in capsys.readouterr().err
    assert shell(monkeypatch, "certify", run) == 2
    assert "no records" in capsys.readouterr().err


def test_a_recipe_has_data_or_an_environment(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(RECIPE.replace("model:", "data: {name: digits}\nmodel:"))
    with pytest.raises(TrivetError, match=r"line 3: environment: a recipe learns from data or from an environment"):
        plan(load(path))
    path.write_text(RECIPE.replace("l2", "linf"))
    with pytest.raises(TrivetError, match="must be l2"):
        plan(load(path))
    path.write_text(RECIPE.replace("sigma: 0.3, ", ""))
    with pytest.raises(TrivetError, match="an agent without noise has no certificate"):
        plan(load(path))


# Contradictions, made up.


def mean(value: float, half: float = 1.0) -> MeanReturn:
    return MeanReturn(mean=value, low=value - half, high=value + half, episodes=10, confidence=0.95)


def point(budget: float, certified: float | None, attacked: float | None) -> PolicyPoint:
    attack = (
        None if attacked is None else PolicyAttack(spec={}, left=mean(attacked), spent=0.1, most_spent=0.1, seconds=1)
    )
    return PolicyPoint(budget=budget, certified=certified, attacks=() if attack is None else (attack,))


@pytest.mark.parametrize(
    ("points", "raised"),
    [
        ([point(0, 9, None), point(1, 5, 8)], []),
        ([point(0, 9, None), point(1, 8.9, 8)], []),  # within the interval
        ([point(0, 9, None), point(1, 9.1, 8)], ["certified_above_attacked"]),
        ([point(0, 11.1, None), point(1, 5, 8)], ["certified_above_clean_return"]),
        ([point(0, 9, None), point(1, 5, 12.1)], ["attacked_above_clean_return"]),
        ([point(0, None, None), point(1, None, 8)], []),
    ],
)
def test_numbers_that_contradict_each_other_are_found(points: list[PolicyPoint], raised: list[str]) -> None:
    assert [check.name for check in checks(mean(10), points) if check.raised] == raised


def test_a_contradicted_certificate_is_voided_and_turns_the_command_red(
    run: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    """An adversary outside the certificate: it is told of no budget at all, as a bug in the bound would look."""
    import shutil

    other = tmp_path / "run"
    shutil.copytree(run, other)

    def cheating(self: SteadyPush, view: View) -> Tensor:
        return torch.full_like(view.observation, 50.0)

    monkeypatch.setattr(SteadyPush, "__call__", cheating)
    monkeypatch.setattr("trivet.control.episodes.require", lambda *_: None)
    assert shell(monkeypatch, "audit", other) == 1
    assert "error: An attack leaves less than is certified" in capsys.readouterr().out
    (ended,) = [claim for claim in Ledger.load(other / "claims.json").claims if isinstance(claim, CertificateClaim)]
    assert ended.voided is not None
    assert "contradicted: an attack leaves less than is certified" in ended.voided.reason
    assert "The certificate is wrong" in (other / "report.html").read_text()


def test_a_certificate_of_other_weights_is_no_certificate(run: Path) -> None:
    opened = Run.open(run)
    environment, audit = opened.plan.environment, opened.plan.policy_audit
    assert environment is not None
    assert audit is not None
    other = mlp(environment.input_shape, 2, hidden=(), generator=torch.Generator().manual_seed(1))
    found = audit.run(other, seed=0, name="x", source="x", certified=opened.history[-1])
    assert [each.certified for each in found.points] == [None] * len(found.points)
    ledger = copy.deepcopy(opened.claims)
    void_contradicted(ledger, found)
    assert not ledger.holding
    assert len(policy_claims(found, audit, "again")) == 2


def test_intervals_of_several_attacks_hold_at_once(run: Path) -> None:
    found = PolicyFindings.load(run / "audit.json")
    assert {attack.left.confidence for each in found.points for attack in each.attacks} == {0.975}
    assert found.clean.confidence == 0.95


def test_settings_of_an_audit_are_checked_and_made_again() -> None:
    cart = CartPole(2, 0.1)
    audit = PolicyAudit(cart, L2(0.1), (GreedyFlip(1.0, 4), SteadyPush(3)))
    assert build("audit", spec_of(audit)) == audit
    with pytest.raises(BadValue, match="must be l2"):
        PolicyAudit(cart, Linf(0.1))
    for settings in (
        {"attacks": ()},
        {"budgets": (-1.0,)},
        {"episodes": 0},
        {"clean_episodes": 0},
        {"confidence": 1.0},
    ):
        with pytest.raises(BadValue, match=next(iter(settings))):
            PolicyAudit(cart, L2(0.1), **settings)  # type: ignore[arg-type]


def test_damaged_findings_are_named(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text('{"format": 1}')
    with pytest.raises(TrivetError, match=r"is no audit of a policy \(name: Field required\); audit again"):
        PolicyFindings.load(tmp_path / "audit.json")
