"""Claims: statements about a model with a number, a confidence, how to check them again, and what voids them.

A `Ledger` travels with the model through the stages. Each stage states its `Effect` on every kind of claim; a voided
claim is kept, with the stage and the reason, because "this was true before pruning" is worth knowing and must never
be mistaken for "this is true".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from trivet.errors import TrivetError
from trivet.files import read_json, write_json


class Voided(BaseModel):
    """Which stage ended a claim, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: str
    reason: str


class Claim(BaseModel):
    """What every claim carries.

    Attributes:
        statement: one sentence for people; it must be true as it stands.
        value: the number, in the unit of `unit`.
        interval: lower and upper bound at `confidence`, or None where the number is exact.
        obtained: the method, by its registered name, with every setting needed to compute it again.
        recheck: a command that checks it again.
        artefact: SHA-256 of the weights the claim is about; a claim about other weights is not this claim.
        conditions: what must hold for it to be true at all (determinism, dtype, "only these attacks").
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    statement: str
    value: float
    unit: str
    interval: tuple[float, float] | None = None
    confidence: float | None = None
    obtained: dict[str, Any]
    recheck: str
    artefact: str
    conditions: tuple[str, ...] = ()
    made_by: str
    voided: Voided | None = None

    @property
    def holds(self) -> bool:
        return self.voided is None


class AccuracyClaim(Claim):
    """Accuracy on unperturbed test inputs; of a policy, its mean return over `points` episodes without attack."""

    kind: Literal["accuracy"] = "accuracy"
    points: int


class AttackClaim(Claim):
    """Accuracy, or mean return, left under a named attack: an upper bound on what is robust, never a proof."""

    kind: Literal["attack"] = "attack"
    threat: dict[str, Any]
    points: int


class CertificateClaim(Claim):
    """Share of test points proved constant within a radius; of a policy, a proved lower bound on its mean return."""

    kind: Literal["certificate"] = "certificate"
    norm: str
    radius: float
    points: int


class PrivacyClaim(Claim):
    """(epsilon, delta)-differential privacy of the training records; `value` is epsilon."""

    kind: Literal["privacy"] = "privacy"
    delta: float
    adjacency: Literal["add_remove", "replace", "zero_out"]


class CostClaim(Claim):
    """Bytes, parameters, FLOPs or latency, as counted or measured on the named machine."""

    kind: Literal["cost"] = "cost"
    measure: str


AnyClaim = Annotated[
    AccuracyClaim | AttackClaim | CertificateClaim | PrivacyClaim | CostClaim, Field(discriminator="kind")
]
_CLAIMS: TypeAdapter[list[AnyClaim]] = TypeAdapter(list[AnyClaim])
KINDS = ("privacy", "certificate", "attack", "accuracy", "cost")


class Verdict(StrEnum):
    """What a stage does to the claims of one kind."""

    KEEP = "keep"  # still true of the new model
    COMPOSE = "compose"  # replaced by the claim the stage issues, which includes the old one
    VOID = "void"  # no longer known to be true
    RECOMPUTE = "recompute"  # void, and the audit measures it anew


@dataclass(frozen=True)
class Effect:
    """A stage's verdict on each kind of claim, with the reason a user will read."""

    privacy: tuple[Verdict, str]
    certificate: tuple[Verdict, str]
    attack: tuple[Verdict, str]
    accuracy: tuple[Verdict, str]
    cost: tuple[Verdict, str]


class Ledger:
    """The claims of one model, holding and voided, in the order they were made."""

    def __init__(self, claims: tuple[Claim, ...] = ()) -> None:
        self.claims = claims

    def add(self, *claims: Claim) -> None:
        """Enter new claims; an equal question answered before (same kind, unit and method) is superseded."""
        fresh = {_question(claim) for claim in claims}
        superseded = Voided(stage=claims[0].made_by, reason="measured again") if claims else None
        self.claims = tuple(
            claim.model_copy(update={"voided": superseded}) if claim.holds and _question(claim) in fresh else claim
            for claim in self.claims
        ) + tuple(claims)

    def apply(self, stage: str, effect: Effect) -> None:
        """Void what `stage` voids. COMPOSE voids too: the stage adds the composed claim itself."""
        self.claims = tuple(self._after(claim, stage, effect) for claim in self.claims)

    @staticmethod
    def _after(claim: Claim, stage: str, effect: Effect) -> Claim:
        verdict, reason = getattr(effect, claim.kind)  # type: ignore[attr-defined]
        if not claim.holds or verdict is Verdict.KEEP:
            return claim
        return claim.model_copy(update={"voided": Voided(stage=stage, reason=reason)})

    def void(self, claim: Claim, stage: str, reason: str) -> None:
        """Void one claim, as a failed re-check does."""
        voided = claim.model_copy(update={"voided": Voided(stage=stage, reason=reason)})
        self.claims = tuple(voided if each is claim else each for each in self.claims)

    def rebind(self, kind: str, artefact: str) -> None:
        """Carry holding claims of a kind over to weights made from those they were about, as post-processing allows."""
        self.claims = tuple(
            claim.model_copy(update={"artefact": artefact}) if claim.holds and claim.kind == kind else claim  # type: ignore[attr-defined]
            for claim in self.claims
        )

    @property
    def holding(self) -> tuple[Claim, ...]:
        return tuple(claim for claim in self.claims if claim.holds)

    def dump(self) -> dict[str, Any]:
        """The ledger as JSON values."""
        return {"format": 1, "claims": [claim.model_dump(mode="json") for claim in self.claims]}

    @classmethod
    def parse(cls, content: Any, where: str) -> Ledger:
        """The ledger that `dump` wrote; `where` is named in errors."""
        if not isinstance(content, dict) or content.get("format") != 1:
            raise TrivetError(f"{where} has an unknown format; it was written by another version of Trivet.")
        try:
            return cls(tuple(_CLAIMS.validate_python(content["claims"])))
        except (ValueError, KeyError) as error:
            raise TrivetError(f"{where} does not hold valid claims ({error}); run the audit again.") from None

    def save(self, path: Path) -> None:
        write_json(path, self.dump())

    @classmethod
    def load(cls, path: Path) -> Ledger:
        return cls.parse(read_json(path), str(path))


def _question(claim: Claim) -> str:
    """What a claim answers, without the answer: two claims with the same question supersede each other."""
    fields = claim.model_dump(
        mode="json", exclude={"statement", "value", "interval", "voided", "made_by", "artefact", "recheck"}
    )
    return repr(sorted(fields.items(), key=lambda item: item[0]))
