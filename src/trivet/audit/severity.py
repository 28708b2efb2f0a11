"""How severe mistakes are, by a hierarchy of the classes (Bertinetto et al., CVPR 2020).

D(y, j) is the height of the lowest common ancestor of two classes. Severity, the mean of D over mistakes, says nothing
about how many there are: a worse model with many near misses has a lower one. It always stands beside the error and
hdist@1 = error x severity, the mean of D over all records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trivet.audit.masking import Behaviour
from trivet.audit.severity_finding import Mistakes, Ranked, SeverityFinding
from trivet.data.dataset import Dataset
from trivet.data.hierarchy import Hierarchy
from trivet.models.modes import device_of, evaluating
from trivet.statistics import Rate
from trivet.threats.attack import Attack
from trivet.threats.hierarchy_pgd import HierarchyPGD
from trivet.threats.rotation_translation import balls
from trivet.threats.threat import ThreatModel

_RANKS = (1, 5, 10, 20, 100)
CLEAN, FIRST = "no attack", "all attacks, the first that succeeded"


def attacks(threat: ThreatModel, hierarchy: Hierarchy | None, seen: Behaviour, samples: int) -> tuple[Attack, ...]:
    """What an audit with a hierarchy adds to its battery: for each geometry, targets in the order of severity.

    Args:
        samples: to average gradients over where the model turns out to be randomised.
    """
    if hierarchy is None or not seen.differentiable:
        return ()
    members = balls(threat)
    return tuple(HierarchyPGD(each, hierarchy=hierarchy, samples=samples if seen.randomised else 1) for each in members)


def mistakes(
    label: str, said: Tensor, labels: Tensor, hierarchy: Hierarchy, confidence: float, *, aimed: bool = False
) -> Mistakes:
    """The mistakes among answers `said` [N] for records labelled `labels` [N].

    An answer below 0, of a model whose logits were no numbers, counts as the most severe mistake.
    """
    apart = _apart(hierarchy, labels, said[:, None]).squeeze(1)
    by_height = torch.bincount(apart, minlength=hierarchy.height + 1)[1:].tolist()
    wrong = sum(by_height)
    total = sum(height * count for height, count in enumerate(by_height, 1))
    return Mistakes(
        label=label,
        aimed=aimed,
        error=Rate(wrong, len(labels), confidence),
        by_height=tuple(by_height),
        severity=total / wrong if wrong else None,
        interval=interval(by_height, confidence) if wrong else None,
        hdist=total / len(labels),
    )


def interval(by_height: Sequence[int], confidence: float) -> tuple[float, float]:
    """Of the mean of D over mistakes of which `by_height` have D = 1, 2, …: exact and conservative, see `Mistakes`."""
    wrong, tails = sum(by_height), len(by_height) - 1
    rates = [Rate(sum(by_height[h:]), wrong, 1 - (1 - confidence) / tails) for h in range(1, len(by_height))]
    low, high = (1 + sum(each.interval[end] for each in rates) for end in (0, 1))
    return low, high


def ranked(logits: Tensor, labels: Tensor, hierarchy: Hierarchy, k: int) -> Ranked:
    """The measures of the `k` classes with the largest of the `logits` [N, K], among equals the first."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    apart = _apart(hierarchy, labels, order).double()
    wrong = apart[:, 0] > 0
    kin = 1 - apart / hierarchy.height
    most = (1 - hierarchy.distances.double() / hierarchy.height).sort(dim=1, descending=True).values[labels, :k]
    precision = (kin.cumsum(1) / most.cumsum(1)).mean(0)
    return Ranked(
        k=k,
        hdist=float(apart.mean()),
        best=float(apart.amin(1).mean()),
        mistakes=float(apart[wrong].mean()) if wrong.any() else None,
        hprecision=float(precision[-1]),
        hmap=float(precision.mean()),
    )


def _apart(hierarchy: Hierarchy, labels: Tensor, classes: Tensor) -> Tensor:
    """D of each record's label [N] from its `classes` [N, k]."""
    apart = hierarchy.distances[labels[:, None], classes.clamp(min=0)]
    return apart.where(classes >= 0, hierarchy.height)


def find(
    hierarchy: Hierarchy,
    model: nn.Module,
    data: Dataset,
    clean: Tensor,
    attacked: Mapping[str, Tensor],
    aimed: Sequence[str],
    *,
    confidence: float,
    batch_size: int,
) -> SeverityFinding:
    """The finding about answers without attack `clean` [N] and after each attack, in the order they ran.

    Args:
        aimed: the labels of attacks that look for severe mistakes.
    """
    labels = data.labels
    rows = [mistakes(CLEAN, clean, labels, hierarchy, confidence)]
    first = clean
    for label, said in attacked.items():
        rows.append(mistakes(label, said, labels, hierarchy, confidence, aimed=label in aimed))
        first = said.where(first == labels, first)
    if len(attacked) > 1:
        rows.append(mistakes(FIRST, first, labels, hierarchy, confidence, aimed=bool(aimed)))
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        logits = torch.cat([model(batch.inputs.to(device)).cpu() for batch in data.batches(batch_size)])
    sure = logits.isfinite().all(1)
    ranks = sorted({min(k, data.num_classes) for k in _RANKS}) if sure.any() else []
    return SeverityFinding(
        height=hierarchy.height,
        chance=hierarchy.chance,
        conditions=tuple(rows),
        ranked=tuple(ranked(logits[sure], labels[sure], hierarchy, k) for k in ranks),
    )
