"""What a report is about: one audited model, with everything known of how it came to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trivet.audit.findings import Findings
from trivet.claims import Claim


@dataclass(frozen=True)
class Subject:
    """One audited model.

    Attributes:
        recipe: the recipe it was made by, as plain values; empty for a model from elsewhere.
        run: run.json, with the sessions that worked on it.
        log: the lines of the training log.
        claims: holding and voided.
        examples: what `Audit.run` returned beside the findings.
        history: what each training stage recorded, as the weights' file has it.
    """

    name: str
    findings: Findings
    claims: Sequence[Claim] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
