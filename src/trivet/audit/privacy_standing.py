"""What a model may say about privacy: its claim, why there is none, and whether a leak test refutes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trivet.audit.leak_finding import LeakFinding
from trivet.audit.subject import Subject
from trivet.claims import PrivacyClaim
from trivet.methods import methods
from trivet.training.private_stage import delta_text, rounded_up

_VOID = "privacy claim void: "
"""How the notes of methods begin whose published privacy claim does not hold."""
_PLACES = {"rule": "privacy", "objective": "objectives"}
"""Under which keys a recipe names methods, and of which room."""


@dataclass(frozen=True)
class Standing:
    """How a model stands.

    Attributes:
        claim: the holding privacy claim.
        voided: privacy claims that hold no longer.
        refuting: the leak tests whose lower bound lies above what was claimed.
        reasons: whole sentences on why there is no claim, where more is known than that.
    """

    claim: PrivacyClaim | None
    voided: tuple[PrivacyClaim, ...]
    refuting: tuple[LeakFinding, ...]
    reasons: tuple[str, ...]

    @property
    def short(self) -> str:
        """For a cell of a table: "ε 2.88 at δ 1e-5", "refuted" or "none"."""
        if self.refuting:
            return "refuted"
        return "none" if self.claim is None else f"ε {rounded_up(self.claim.value)} at δ {delta_text(self.claim.delta)}"


def standing(subject: Subject) -> Standing:
    """How `subject` stands, from its claims, the methods it was made by, and the leak tests of its audit."""
    privacy = [claim for claim in subject.claims if isinstance(claim, PrivacyClaim)]
    return Standing(
        claim=next((claim for claim in reversed(privacy) if claim.holds), None),
        voided=tuple(claim for claim in privacy if not claim.holds),
        refuting=tuple(leak for leak in subject.findings.leaks if leak.contradicts),
        reasons=(*_void_methods(subject), *_unprotected(subject)),
    )


def _void_methods(subject: Subject) -> Iterator[str]:
    """Methods of this model whose authors' claim is known not to hold."""
    used = set(_methods_in([subject.recipe, *subject.history]))
    said = set()
    for room in _PLACES.values():
        for each in methods(room):
            if (room, each.name) in used and each.note.startswith(_VOID) and each.note not in said:
                said.add(each.note)  # a method in several parts says it once
                who = f"{each.title} ({each.paper})" if each.paper else each.title
                yield f"The privacy claim published with {who} is void: {each.note.removeprefix(_VOID)}."


def _methods_in(settings: Any) -> Iterator[tuple[str, str]]:
    """Room and name of every rule and objective that is named anywhere in `settings`."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            name = value.get("name") if isinstance(value, Mapping) else value
            if key in _PLACES and isinstance(name, str):
                yield _PLACES[key], name
            yield from _methods_in(value)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from _methods_in(value)


def _unprotected(subject: Subject) -> Iterator[str]:
    """Why stages that were meant to be private are not."""
    accounts = [stage.get("privacy") or {} for stage in subject.history]
    for said in dict.fromkeys(str(each.get("standing", "private")) for each in accounts):
        if said != "private":
            yield f"This run is {said}."


def rounded_down(epsilon: float) -> str:
    """Three digits, never more than it is: what a lower bound says, it must have shown."""
    if epsilon <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    return f"{math.floor(epsilon / unit + 1e-9) * unit:.3g}"
