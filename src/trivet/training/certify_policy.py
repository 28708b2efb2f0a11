"""The last stage of a policy's recipe: play the certification episodes, and claim what they prove."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from trivet import display
from trivet.certify.policy_smoothing import PolicyCertificate, PolicySmoothing
from trivet.claims import CertificateClaim, Effect, Verdict
from trivet.control.environment import Environment
from trivet.control.episodes import play
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.threats.threat import ThreatModel
from trivet.training.stage import Checkpoint, Context, Stage


@method(title="Certification of a policy's return", paper="Kumar, Levine & Feizi, ICLR 2022", year=2022, legs="robust")
@dataclass(frozen=True)
class CertifyPolicy(Stage):
    """Play `episodes` of the smoothed agent without attack, and state the mean return that policy smoothing proves.

    The environment's noise, its possible returns and its least return are the certificate's. The episodes have a
    purpose of their own among the seeds, so that they chose neither weights nor settings, as the bound requires.

    Attributes:
        environment: the recipe's, with its noise.
        threat: the recipe's: an l_2 ball, whose radius is the budget of a whole episode that the claim is about.
        budgets: where the curve is stated besides; none given means quarters of the radius up to twice as much.
        episodes, alpha, bound: of the certificate.
    """

    environment: Environment
    threat: ThreatModel
    budgets: tuple[float, ...] = ()
    episodes: int = 10_000
    alpha: float = 0.05
    bound: Literal["clopper_pearson", "dkw", "dkw_one_sided"] = "clopper_pearson"

    def __post_init__(self) -> None:
        require_l2(self.threat)
        require(
            all(0 <= budget < math.inf for budget in self.budgets),
            f"budgets={list(self.budgets)} must be finite and not negative.",
        )
        self.smoothing()

    def smoothing(self) -> PolicySmoothing:
        """The certificate's settings; refuses an environment without noise."""
        return PolicySmoothing(
            self.environment.sigma,
            self.environment.returns if self.bound == "clopper_pearson" else (),
            self.environment.r_min,
            self.episodes,
            self.alpha,
            self.bound,
        )

    def effect(self) -> Effect:
        kept = (Verdict.KEEP, "certification changes nothing")
        return Effect(privacy=kept, certificate=kept, attack=kept, accuracy=kept, cost=kept)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model = checkpoint.model.to(context.device)
        with display.progress(f"{context.files.name} episodes", self.episodes) as advance:
            returns = play(
                self.environment,
                model,
                self.episodes,
                seed=context.seed,
                purpose="certification",
                advance=advance,
            ).returns
        found = self.smoothing().certify(returns)
        checkpoint.ledger.add(self._claim(found, checkpoint, context))
        budgets = sorted({0.0, self.threat.eps, *(self.budgets or curve_of(self.threat.eps))})
        record = {
            "stage": "certify_policy",
            "settings": spec_of(self),
            "artefact": checkpoint.artefact,
            "mean": float(returns.mean()),
            "thresholds": found.thresholds.tolist(),
            "counts": found.counts.tolist(),
            "curve": [[budget, found.mean(budget)] for budget in budgets],
            "conditions": list(found.conditions),
        }
        return replace(checkpoint, history=[*checkpoint.history, record])

    def _claim(self, found: PolicyCertificate, checkpoint: Checkpoint, context: Context) -> CertificateClaim:
        budget = self.threat.eps
        value = found.mean(budget)
        name = self.environment.title
        obtained: dict[str, Any] = {"name": "policy_smoothing", "seed": context.seed, **spec_of(self.smoothing())}
        return CertificateClaim(
            statement=f"With confidence {1 - self.alpha:g}, the smoothed agent's mean return per episode of {name}, at "
            f"most {self.environment.horizon} steps, is at least {floored(value)} under every adversary that moves its "
            f"observations by at most {budget:g} in l_2 over the whole episode.",
            value=value,
            unit="return",
            interval=(value, max(self.environment.returns)),
            confidence=1 - self.alpha,
            obtained={**obtained, "environment": spec_of(self.environment)},
            recheck=f"trivet audit {context.files.run.path}",
            artefact=checkpoint.artefact,
            conditions=found.conditions,
            made_by=context.files.name,
            norm="L2",
            radius=budget,
            points=self.episodes,
        )


def require_l2(threat: ThreatModel) -> None:
    """Refuse a budget in another geometry than the one Gaussian noise answers."""
    require(
        threat.norm == "L2",
        f"threat={spec_of(threat)['name']!r} must be l2: Gaussian noise bounds the l_2 length of what an adversary "
        "does to a whole episode.",
    )


def curve_of(budget: float) -> tuple[float, ...]:
    """Quarters of a budget, up to twice as much."""
    return tuple(float(f"{budget * quarter / 4:.6g}") for quarter in range(9))


def floored(value: float) -> str:
    """A return in four digits, never rounded up."""
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    return f"{math.floor(value / unit) * unit:.4g}"
