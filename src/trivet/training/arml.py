"""Adversarially robust metric learning (Wang, Liu, Yi, Jiang & Hsieh, "Provably Robust Metric Learning", NeurIPS 2020).

It stands with the training loops, above the certificate it maximises: it takes arrays, sees all records at every step,
and its product is a matrix. `trivet.estimators` gives it the interface of scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.display import Advance
from trivet.errors import require
from trivet.methods import method
from trivet.randomness import generator

_BLOCK = 1000  # records of a class whose distances to all others are computed together


@method(
    title="Adversarially robust metric learning (ARML)",
    paper="Wang et al., NeurIPS 2020",
    year=2020,
    legs="robust",
    note="takes arrays, through trivet.estimators; not a stage of recipes",
)
@dataclass(frozen=True)
class Arml:
    """max_G mean_z s(x+, x-, z),  s = (d_M(z, x-) - d_M(z, x+)) / (2 || M (x+ - x-) ||_2),  M = G^T G.

    s is the l_2 distance by which z must move until x- is as near as x+, the certificate of one triple, without its
    max(0, .), so that misclassified triples still have a gradient. Each epoch takes, for every record z, one of its
    `candidates` nearest records of its own class as x+ and of the other classes as x-, nearest under the present G,
    drawn uniformly; then makes one step of Adam on G, which starts as the identity. All records form one batch.

    It raises a surrogate of the radius on the training records and promises nothing about others; the certificate
    (`trivet.certify.metric`) does, point by point. M is positive semi-definite by construction. Radii, hence the loss,
    do not change when G is multiplied by a number. Features should share a scale: the paper maps each to [0, 1].

    Records that are the only one of their class serve as x-, never as z. Of the paper's code, the options that its
    experiments do not use (hinge, exponential and logistic losses, mini-batches) are left out.

    Attributes:
        epochs: steps of Adam. 1000 in the paper; on scikit-learn's digits 60 reach nearly the same loss.
        lr: of Adam.
        candidates: nearest records that x+ and x- are drawn from; 1 always takes the nearest.
    """

    epochs: int = 1000
    lr: float = 1e-3
    candidates: int = 10

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"epochs={self.epochs} must not be negative.")
        require(0 < self.lr < float("inf"), f"lr={self.lr} must be positive and finite.")
        require(self.candidates >= 1, f"candidates={self.candidates} must be at least 1.")

    def learn(self, x: Tensor, labels: Tensor, *, seed: int, advance: Advance | None = None) -> tuple[Tensor, Tensor]:
        """G [D, D] and the loss of each epoch before its step [epochs], for records `x` [N, D] with `labels` [N].

        Labels are any whole numbers. G has the dtype and device of `x`; float32 is enough, because certificates are
        computed anew for what was learnt.

        Raises:
            BadValue: shapes that do not fit, values that are not finite, one class only, or no two records of a class.
        """
        require(
            x.ndim == 2 and labels.shape == (len(x),),
            f"records must be [N, D] and labels [N], got {tuple(x.shape)} and {tuple(labels.shape)}.",
        )
        require(bool(x.isfinite().all()), "records must be finite.")
        classes, codes, sizes = labels.unique(return_inverse=True, return_counts=True)
        require(len(classes) >= 2, f"records of {len(classes)} class teach no metric; at least two are needed.")
        require(
            bool((sizes >= 2).any()), "no class has two records, so that no record has a neighbour of its own class."
        )
        centred = x - x.mean(0)  # all that matters is differences, which round less so
        factor = torch.eye(x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        adam = torch.optim.Adam([factor], lr=self.lr)
        losses = torch.empty(self.epochs, dtype=x.dtype)
        for epoch in range(self.epochs):
            draw = generator(seed, "arml", epoch)
            features = centred @ factor.T
            chosen = triples(features.detach(), codes, self.candidates, draw)
            loss = -margins(factor, *(features[each] for each in chosen)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses[epoch] = loss.detach()
            if advance:
                advance(1)
        return factor.detach(), losses


def margins(factor: Tensor, z: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """s [B] of the triples (x+, x-, z) under G = `factor` [R, D], given G z, G x+ and G x-, all [B, R].

    The square of || M (x+ - x-) ||_2 is taken to be at least 1e-6, as in the authors' code.
    """
    ahead = (z - others).square().sum(1) - (z - own).square().sum(1)
    slope = ((own - others) @ factor).square().sum(1)
    return ahead / (2 * slope.clamp(min=1e-6).sqrt())


@torch.no_grad()
def triples(features: Tensor, labels: Tensor, candidates: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [B] of z, x+ and x-: one triple for each record that has another of its class.

    x+ is drawn uniformly from the `candidates` nearest of its own class, itself excluded, x- from those of the other
    classes; from all, where there are fewer. `labels` count from 0.
    """
    chances = torch.rand(2, len(labels), generator=draw).to(features)
    own, others = torch.full_like(labels, -1), torch.empty_like(labels)
    for label in labels.unique():
        (members,), (rest,) = ((labels == label).nonzero(as_tuple=True), (labels != label).nonzero(as_tuple=True))
        if len(members) < 2:
            continue
        for start in range(0, len(members), _BLOCK):
            rows = members[start : start + _BLOCK]
            among = _squared_distances(features[rows], features[members])
            among.diagonal(start).fill_(torch.inf)
            own[rows] = members[_drawn(among, min(candidates, len(members) - 1), chances[0, rows])]
            away = _squared_distances(features[rows], features[rest])
            others[rows] = rest[_drawn(away, min(candidates, len(rest)), chances[1, rows])]
    (anchors,) = (own >= 0).nonzero(as_tuple=True)
    return anchors, own[anchors], others[anchors]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[A, B], less || a ||^2, which does not change the order in a row."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2)


def _drawn(distances: Tensor, candidates: int, chance: Tensor) -> Tensor:
    """For each row one of its nearest columns: `chance` [B] in [0, 1) says which."""
    # A chance just below 1 may round up to the number of candidates.
    rank = (chance * candidates).long().clamp(max=candidates - 1)
    return distances.topk(candidates, largest=False).indices.gather(1, rank[:, None]).squeeze(1)
