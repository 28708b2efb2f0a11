"""The audit of a policy: play it without attack, attack it budget by budget, and hold both against its certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trivet import display, machine
from trivet.audit.findings import Check
from trivet.audit.policy_findings import MeanReturn, PolicyAttack, PolicyFindings, PolicyPoint
from trivet.certify.policy_smoothing import mean_interval
from trivet.claims import AccuracyClaim, AttackClaim, CertificateClaim, Claim, Ledger
from trivet.control.environment import Environment
from trivet.control.episodes import play
from trivet.control.greedy_flip import GreedyFlip
from trivet.control.observation_attack import ObservationAttack
from trivet.control.steady_push import SteadyPush
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.models.fingerprint import fingerprint
from trivet.threats.threat import ThreatModel
from trivet.training.certify_policy import curve_of, require_l2

_MADE_BY = "audit"
# Fewer draws and longer steps than in the paper (128 and 0.01), for minutes instead of hours on a CPU.
_ATTACKS = (*(GreedyFlip(threshold, draws=16, step=0.05) for threshold in (0.0, 1.0, 2.0)), SteadyPush())


@method(title="Audit of a policy", name="policy_audit")
@dataclass(frozen=True)
class PolicyAudit:
    """Attack a policy's observations under l_2 budgets for whole episodes.

    Attributes:
        environment: the recipe's, with the noise that the agent adds.
        threat: the recipe's: an l_2 ball, whose radius is the budget of an episode.
        attacks: each tried at every budget; the worst counts. None given means greedy
            flips at thresholds 0, 1 and 2, and steady pushes.
        budgets: none given means quarters of the threat's radius up to twice as much.
        episodes: played under each attack.
        clean_episodes: played without.
        confidence: of every interval; those of several attacks at one budget hold at once.
    """

    environment: Environment
    threat: ThreatModel
    attacks: tuple[ObservationAttack, ...] = _ATTACKS
    budgets: tuple[float, ...] = ()
    episodes: int = 200
    clean_episodes: int = 1_000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require_l2(self.threat)
        require(len(self.attacks) > 0, "attacks=[] must name at least one.")
        require(
            all(0 <= budget < math.inf for budget in self.budgets),
            f"budgets={list(self.budgets)} must be finite and not negative.",
        )
        require(self.episodes >= 1, f"episodes={self.episodes} must be at least 1.")
        require(self.clean_episodes >= 1, f"clean_episodes={self.clean_episodes} must be at least 1.")
        require(0 < self.confidence < 1, f"confidence={self.confidence} must lie strictly between 0 and 1.")

    def run(
        self, policy: nn.Module, *, seed: int, name: str, source: str, certified: Mapping[str, Any] | None = None
    ) -> PolicyFindings:
        """Audit `policy`; `certified` is what the stage certify_policy recorded, if it did, of these weights."""
        began, artefact = time.perf_counter(), fingerprint(policy)
        known = certified if certified and certified["artefact"] == artefact else None
        curve: dict[float, float] = dict(known["curve"]) if known else {}
        budgets = sorted({0.0, self.threat.eps, *(self.budgets or curve_of(self.threat.eps)), *curve})
        episodes = play(self.environment, policy, self.clean_episodes, seed=seed, purpose="policy audit, clean")
        clean = self._mean(episodes.returns, self.confidence)
        points = []
        with display.progress("attack", len(budgets) * len(self.attacks)) as advance:
            for budget in budgets:
                attacks = []
                for attack in self.attacks if budget else ():  # without a budget nothing can be tried
                    attacks.append(self._attack(policy, attack, budget, seed))
                    advance(1, note=f"{attacks[-1].left.mean:.4g} left at {budget:g}")
                points.append(PolicyPoint(budget=budget, certified=curve.get(budget), attacks=tuple(attacks)))
        return PolicyFindings(
            name=name,
            source=source,
            artefact=artefact,
            environment=spec_of(self.environment),
            settings=spec_of(self),
            seed=seed,
            provenance=machine.describe(),
            seconds=time.perf_counter() - began,
            clean=clean,
            points=tuple(points),
            confidence_certified=1 - known["settings"]["alpha"] if known else None,
            conditions=tuple(known["conditions"]) if known else (),
            checks=checks(clean, points),
        )

    def _attack(self, policy: nn.Module, attack: ObservationAttack, budget: float, seed: int) -> PolicyAttack:
        began = time.perf_counter()
        found = play(
            self.environment,
            policy,
            self.episodes,
            seed=seed,
            purpose="policy audit, attacked",
            adversary=attack,
            budget=budget,
        )
        each = 1 - (1 - self.confidence) / len(self.attacks)
        return PolicyAttack(
            spec=spec_of(attack),
            left=self._mean(found.returns, each),
            spent=float(found.spent.mean()),
            most_spent=float(found.spent.max()),
            seconds=time.perf_counter() - began,
        )

    def _mean(self, returns: Tensor, confidence: float) -> MeanReturn:
        environment = self.environment
        low, high = mean_interval(returns, environment.returns, r_min=environment.r_min, confidence=confidence)
        mean, episodes = float(returns.mean()), len(returns)
        return MeanReturn(mean=mean, low=low, high=high, episodes=episodes, confidence=confidence)


def checks(clean: MeanReturn, points: list[PolicyPoint]) -> tuple[Check, ...]:
    """Certified <= attacked <= clean, beyond what chance explains."""
    broken = [p for p in points if p.certified is not None and p.at_most is not None and p.certified > p.at_most]
    nothing = next((p.certified for p in points if p.budget == 0 and p.certified is not None), None)
    raised = [p for p in points if p.worst is not None and p.worst.left.low > clean.high]
    return (
        Check(
            name="certified_above_attacked",
            title="An attack leaves less than is certified",
            kind="consistency",
            severity="error",
            raised=bool(broken) if any(p.certified is not None for p in points) else None,
            rule="at some budget, the certified return lies above the interval of the return under attack",
            measured={f"at {p.budget:g}": float(p.certified) - float(p.at_most) for p in broken},  # type: ignore[arg-type]
            meaning="The certificate is wrong, or the agent that was attacked is not the one that was certified.",
        ),
        Check(
            name="certified_above_clean_return",
            title="More is certified than is returned without attack",
            kind="consistency",
            severity="error",
            raised=None if nothing is None else nothing > clean.high,
            rule="the certified return at budget 0 lies above the interval of fresh episodes without attack",
            measured={} if nothing is None else {"certified": nothing, "clean, at most": clean.high},
            meaning="The certification episodes were not like others, or the environment has changed.",
        ),
        Check(
            name="attacked_above_clean_return",
            title="The agent returns more under attack than without",
            kind="consistency",
            severity="warning",
            raised=bool(raised),
            rule="at some budget, the interval under the worst attack lies above that of clean episodes",
            measured={f"at {p.budget:g}": p.worst.left.low - clean.high for p in raised if p.worst},
            meaning="The attack helps the agent, so it says nothing about the worst case.",
        ),
    )


def policy_claims(found: PolicyFindings, audit: PolicyAudit, recheck: str) -> list[Claim]:
    """What the audit measured, as claims; what is certified was claimed by the stage that proved it."""
    common: dict[str, Any] = {"artefact": found.artefact, "made_by": _MADE_BY, "recheck": recheck, "unit": "return"}
    obtained = {"environment": found.environment, "seed": found.seed}
    clean = found.clean
    claims: list[Claim] = [
        AccuracyClaim(
            statement=f"The smoothed agent returns {clean.mean:.4g} per episode without attack ({_interval(clean)}).",
            value=clean.mean,
            interval=(clean.low, clean.high),
            confidence=clean.confidence,
            obtained={"name": "return", **obtained},
            points=clean.episodes,
            **common,
        )
    ]
    worst = next(point.worst for point in found.points if point.budget == audit.threat.eps)
    if worst is not None:
        left = worst.left
        claims.append(
            AttackClaim(
                statement=f"The worst of {len(audit.attacks)} attacks within l_2 {audit.threat.eps:g} per episode "
                f"leaves a mean return of {left.mean:.4g} ({_interval(left)}): an upper bound on what the agent keeps.",
                value=left.mean,
                interval=(left.low, left.high),
                confidence=left.confidence,
                obtained={"name": "attacked return", "attack": worst.spec, **obtained},
                conditions=(
                    "an upper bound: only these attacks were tried",
                    f"they spent {worst.spent:.3g} of {audit.threat.eps:g} on average",
                ),
                threat=spec_of(audit.threat),
                points=left.episodes,
                **common,
            )
        )
    return claims


def void_contradicted(ledger: Ledger, found: PolicyFindings) -> None:
    """End the certificates of other weights, and those that the audit contradicts."""
    wrong = next((check for check in found.flags if check.severity == "error"), None)
    for claim in ledger.holding:
        if claim.artefact != found.artefact:
            ledger.void(claim, _MADE_BY, "the weights are not those it was made for")
        elif wrong is not None and isinstance(claim, CertificateClaim):
            ledger.void(claim, _MADE_BY, f"contradicted: {wrong.title.lower()}")


def _interval(found: MeanReturn) -> str:
    return f"{100 * found.confidence:.3g} % interval {found.low:.4g} to {found.high:.4g}, {found.episodes} episodes"
