"""What an audit of a policy measured, with everything needed to judge each number and to measure it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trivet.audit.findings import Check
from trivet.errors import TrivetError
from trivet.files import read_json, write_json
from trivet.training.certify_policy import floored


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MeanReturn(_Record):
    """The mean return of independent episodes, with its exact interval at `confidence`."""

    mean: float
    low: float
    high: float
    episodes: int
    confidence: float


class PolicyAttack(_Record):
    """One attack at one budget.

    Attributes:
        spec: the attack with every setting.
        left: the mean return under it: an upper bound on what the agent keeps under the worst attack.
        spent, most_spent: mean and greatest l_2 length of what was done to an episode's observations.
        seconds: wall-clock time.
    """

    spec: dict[str, Any]
    left: MeanReturn
    spent: float
    most_spent: float
    seconds: float

    def row(self) -> dict[str, str]:
        """What terminals show of it."""
        left = self.left
        interval = f"{left.low:.4g} to {left.high:.4g}"
        return {"attacked": f"{left.mean:.4g}", "interval": interval, "spent": f"{self.spent:.3g}"}


class PolicyPoint(_Record):
    """One budget: what is certified at it, if the run was certified, and what each attack left."""

    budget: float
    certified: float | None
    attacks: tuple[PolicyAttack, ...]

    @property
    def worst(self) -> PolicyAttack | None:
        """The attack that left the least."""
        return min(self.attacks, key=lambda attack: attack.left.mean, default=None)

    @property
    def at_most(self) -> float | None:
        """The least upper end of the attacks' intervals."""
        return min((attack.left.high for attack in self.attacks), default=None)


class PolicyFindings(_Record):
    """Everything one audit of a policy measured.

    Attributes:
        name, source: of the run and its folder.
        artefact: the fingerprint of the weights; the findings are about no others.
        environment: with its noise.
        settings: of the audit.
        clean: the mean return without attack.
        points: budget by budget.
        confidence_certified: of the certificate; None where the run has none of these weights.
        conditions: of the certificate.
        checks: for numbers that contradict each other.
        provenance: command, date, versions and hardware.
    """

    format: Literal[1] = 1
    name: str
    source: str
    artefact: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    provenance: dict[str, Any]
    seconds: float
    clean: MeanReturn
    points: tuple[PolicyPoint, ...]
    confidence_certified: float | None
    conditions: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def flags(self) -> tuple[Check, ...]:
        """The contradictions."""
        return tuple(check for check in self.checks if check.raised)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each budget, for terminals; certificates are never rounded up."""
        return [
            {
                "budget": point.budget,
                "certified": None if point.certified is None else floored(point.certified),
                **(point.worst.row() if point.worst else {"attacked": None, "interval": None, "spent": None}),
            }
            for point in self.points
        ]

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> PolicyFindings:
        """The findings in `path`.

        Raises:
            TrivetError: no such file, another format, or damaged content.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TrivetError(f"{path} is no audit of a policy ({where}: {first['msg']}); audit again.") from None
