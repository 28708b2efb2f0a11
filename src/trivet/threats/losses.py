"""Per-example attack losses: what an attack raises. All take logits [B, K] (and labels [B]) and return [B]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AttackLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive exactly when the point is misclassified (Carlini & Wagner 2017)."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, margin / (z_(1) - z_(3)): invariant to shift and scale (Croce & Hein 2020).

    With two classes there is no third logit, and any ratio of two logits is constant: it is the plain margin then.
    """
    ordered = logits.sort(dim=1, descending=True).values
    if logits.shape[1] == 2:
        return margin(logits, y)
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2): positive only if `target` beats the label (Croce & Hein 2020).

    With three classes the denominator is z_(1) - z_(3), with two the numerator stands alone.
    """
    ordered = logits.sort(dim=1, descending=True).values
    difference = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    if logits.shape[1] == 2:
        return difference
    low = ordered[:, 2] if logits.shape[1] == 3 else 0.5 * (ordered[:, 2] + ordered[:, 3])
    return difference / (ordered[:, 0] - low + 1e-12)


def kl_divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)) of each row."""
    log_p = F.log_softmax(clean_logits, 1)
    return (log_p.exp() * (log_p - F.log_softmax(logits, 1))).sum(1)


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
