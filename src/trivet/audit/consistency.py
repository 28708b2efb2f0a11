"""Numbers that contradict each other: certified <= under attack <= clean, on the same points, always.

A contradiction is a bug or a broken premise, in the model or in this program; no figure beside it can be trusted.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trivet.audit.findings import Check
from trivet.certify.certifier import Certificates
from trivet.data.dataset import Batch
from trivet.models.modes import evaluating


@torch.no_grad()
def of_model(model: nn.Module, batch: Batch, randomised: bool) -> list[Check]:
    """Whether the model's answers are numbers, and about one record at a time."""
    with evaluating(model):
        together = model(batch.inputs)
        alone = torch.cat([model(each[None]) for each in batch.inputs[:16]])
    moved = int((together[:16].argmax(1) != alone.argmax(1)).sum())
    return [
        _check(
            "not_finite",
            "Outputs that are not numbers",
            int((~together.isfinite().all(1)).sum()),
            "any logit of a clean record is NaN or infinite",
            "Such rows count as misclassified; find out what overflows.",
        ),
        _check(
            "depends_on_batch",
            "Answers depend on the batch",
            None if randomised else moved,
            "a record's label differs between alone and among others",
            "The model mixes records (batch statistics?), so that no figure here holds for a single input.",
        ),
    ]


def of_attacks(right: Tensor, standing: dict[str, Tensor], randomised: bool) -> list[Check]:
    """Whether any attack left a point standing that was wrong without it; `right` and each of `standing` [N] bool."""
    wrong = sum(int((left & ~right).sum()) for left in standing.values())
    return [
        _check(
            "attacked_above_clean",
            "More accurate under attack than without",
            None if randomised else wrong,
            "a point counts as right under attack and as wrong without",
            "The clean point is in every set, so the verdicts changed between two looks at the same model.",
        )
    ]


def of_certificates(
    certificates: Certificates, about: Literal["model", "smoothed"], targets: Tensor, clean: Tensor, distance: Tensor
) -> list[Check]:
    """Whether a proof about the model itself is refuted by what attacks found.

    Args:
        about: of which classifier the certifier speaks; the attacks saw the model, and say nothing of a smoothed one.
        targets: [M] int64, the true labels of the certified inputs.
        clean: [M] int64, what the model says without attack.
        distance: [M] float64, how far the nearest adversarial point found lies, in the certificate's norm, 0 where
            the clean point is misclassified and infinite where nothing was found.
    """
    attacked = about == "model"
    certified = (certificates.labels == targets) & ~certificates.abstained
    refuted = int((certified & (distance < certificates.radii)).sum())
    other = int((~certificates.abstained & (certificates.labels != clean)).sum())
    return [
        _check(
            "certificate_refuted",
            "A certificate is refuted by an attack",
            refuted if attacked else None,
            "an adversarial point lies inside a certified ball",
            "The certificate is wrong or about another function than the one that was attacked; trust none of them.",
        ),
        _check(
            "certificate_disagrees",
            "A certificate names another label than the model",
            other if attacked else None,
            "the certified label is not the model's own answer",
            "The certificate is about another function than the model.",
        ),
    ]


def _check(name: str, title: str, count: int | None, rule: str, meaning: str) -> Check:
    return Check(
        name=name,
        title=title,
        kind="consistency",
        severity="error",
        raised=None if count is None else count > 0,
        rule=rule,
        measured={} if count is None else {"points": float(count)},
        meaning=meaning,
    )
