"""Membership attacks by shadow models: models trained on random halves of the records, and success at few false alarms.

The attacked model is one of them, so exactly half of the records are members. What is found holds for models trained
on half of the records, and is no bound on epsilon: records attacked together in one model are not independent trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trivet import display
from trivet.audit.leak_finding import LeakFinding, LowFprPoint, RocPoint
from trivet.audit.leak_test import Trainer
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Dataset
from trivet.errors import require
from trivet.randomness import generator
from trivet.statistics import Rate

FALSE_POSITIVE_RATES = (0.01, 0.001)
NOTE = "success of one attack on models trained on half of the records; no bound on epsilon"
_ROC_POINTS = 100

Signal = Callable[[nn.Module], Tensor]
"""What an attack reads off a model: [N] for the records under attack."""


def halves(records: int, models: int, seed: int) -> Tensor:
    """[models, records] bool: who is in whose training half.

    Models 2j and 2j + 1 have complementary halves, so every record is in half of an even number of models.
    """
    rows = []
    for pair in range(-(-models // 2)):
        chosen = torch.zeros(records, dtype=torch.bool)
        chosen[torch.randperm(records, generator=generator(seed, "half", pair))[: records // 2]] = True
        rows += [chosen, ~chosen]
    return torch.stack(rows[:models])


@dataclass(frozen=True)
class Shadows:
    """What was read off the models.

    Attributes:
        inside: [S, N] bool, who was in the training half of each shadow model. signal: [S, N].
        member: [N] bool, who was in that of the attacked model. target: [N], its signal.
    """

    inside: Tensor
    signal: Tensor
    member: Tensor
    target: Tensor


def train_shadows(trainer: Trainer, data: Dataset, shadows: int, seed: int, signal: Signal, title: str) -> Shadows:
    """Train the attacked model (run 0) and the shadow models, each on a random half of `data`, and read `signal`.

    The attacked model's half is drawn apart from the others, so no shadow model is its complement.
    """
    require(len(data) >= 4, f"dataset {data.name!r} has {len(data)} records, too few to train on halves of them.")
    member = halves(len(data), 1, seed)[0]
    inside = halves(len(data), shadows + 2, seed)[2:]
    rows = []
    with display.progress(title, shadows + 1) as advance:
        for number, half in enumerate((member, *inside)):
            model = trainer(data.select(half.nonzero().flatten()), number=number)
            rows.append(signal(model))
            advance(1)
    return Shadows(inside, torch.stack(rows[1:]), member, rows[0])


def finding(
    scores: Tensor,
    found: Shadows,
    *,
    label: str,
    spec: Mapping[str, Any],
    confidence: float,
    seed: int,
    seconds: float,
    claimed: PrivacyClaim | None,
) -> LeakFinding:
    """What an attack by `scores` [N], larger for members, found with these shadow models."""
    others = int((~found.member).sum())
    return LeakFinding(
        label=label,
        spec=dict(spec),
        access="black box",
        trained=len(found.inside) + 1,
        seconds=seconds,
        confidence=confidence,
        low_fpr=low_fpr(scores, found.member, confidence, seed),
        roc=roc(scores, found.member),
        members=int(found.member.sum()),
        others=others,
        delta=None if claimed is None else claimed.delta,
        claimed=None if claimed is None else claimed.value,
        notes=notes(others),
    )


def low_fpr(scores: Tensor, member: Tensor, confidence: float, seed: int) -> tuple[LowFprPoint, ...]:
    """True-positive rates where false positives are rare, for scores [N] that are larger for members.

    The threshold is set on a random half of the non-members, and errors are counted on the other half: a threshold
    set on those that are counted flatters the attack.
    """
    others = scores[~member]
    require(len(others) >= 2, "scores of two non-members are needed: one half of them sets the threshold.")
    order = torch.randperm(len(others), generator=generator(seed, "threshold half"))
    setting, counted = others[order[: len(others) // 2]], others[order[len(others) // 2 :]]
    points = []
    for nominal in FALSE_POSITIVE_RATES:
        # The least threshold that no more than the nominal share lies above.
        allowed = int(nominal * len(setting))
        threshold = setting.sort(descending=True).values[allowed]
        points.append(
            LowFprPoint(
                nominal=nominal,
                fpr=Rate(int((counted > threshold).sum()), len(counted), confidence),
                tpr=Rate(int((scores[member] > threshold).sum()), int(member.sum()), confidence),
            )
        )
    return tuple(points)


def roc(scores: Tensor, member: Tensor) -> tuple[RocPoint, ...]:
    """The curve of all thresholds, thinned to points that lie evenly on a logarithmic axis of false-positive rates."""
    inside, outside = scores[member].sort().values, scores[~member].sort().values
    exponents = torch.linspace(-float(torch.tensor(float(len(outside))).log10()), 0, _ROC_POINTS, dtype=torch.float64)
    counts = torch.cat([torch.zeros(1), (10**exponents * len(outside)).round()]).long().unique()
    thresholds = outside.flip(0)[counts.clamp(max=len(outside) - 1)]
    points = []
    for count, threshold in zip(counts.tolist(), thresholds, strict=True):
        if count == len(outside):
            points.append(RocPoint(fpr=1.0, tpr=1.0))
            continue
        false = len(outside) - int(torch.searchsorted(outside, threshold, side="right"))
        true = len(inside) - int(torch.searchsorted(inside, threshold, side="right"))
        points.append(RocPoint(fpr=false / len(outside), tpr=true / len(inside)))
    return tuple(dict.fromkeys(points))


def notes(others: int) -> tuple[str, ...]:
    """What to say beside the figures when there were so many non-members."""
    rare = [rate for rate in FALSE_POSITIVE_RATES if rate * (others // 2) < 1]
    said = [f"{others // 2} non-members cannot place a threshold at a false-positive rate of {rate:g}" for rate in rare]
    return (NOTE, *said)
