"""How well the classes are set apart in a space of features: cosines within and between classes, Fisher's ratio."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


class Separability(NamedTuple):
    """What `separability` finds of a set of features.

    Attributes:
        intra: mean cosine of two different records of one class, over all such pairs.
        inter: mean cosine of two records of different classes, over all such pairs.
        fisher: trace of the covariance of the class means over the mean trace of the covariances within the classes;
            of the features themselves, not of their directions.
    """

    intra: float
    inter: float
    fisher: float


def unit(features: Tensor) -> Tensor:
    """The directions [N, D] of features [N, ...], in float32 at least; the direction of a zero vector is zero."""
    flat = features.flatten(1)
    return normalize(flat.to(torch.promote_types(flat.dtype, torch.float32)), dim=1, eps=1e-8)


def separability(features: Tensor, labels: Tensor) -> Separability:
    """`Separability` of features [N, ...] with labels [N]; NaN where there is no pair, or nothing to divide by.

    Sums over pairs come from the sums of the classes, so that the cost is linear in N. Computed in float64.
    """
    flat = features.detach().flatten(1).double()
    directions, member, number = unit(flat), _members(labels), len(flat)
    count, total = member.sum(0), member.T @ directions
    own, alike, pairs = directions.square().sum(), total.square().sum(), total.sum(0).square().sum()
    same = count.square().sum()
    mean = (member.T @ flat) / count[:, None]
    between = (mean - mean.mean(0)).square().sum() / len(mean)
    within = (((flat - member @ mean).square().sum(1) @ member) / count).mean()
    return Separability(
        float((alike - own) / (same - number)),
        float((pairs - alike) / (number * number - same)),
        float(between / within),
    )


def cross_similarity(features: Tensor, others: Tensor, labels: Tensor) -> float:
    """Mean cosine of a row of `features` and a row of `others`, both [N, ...], over all pairs of one class.

    Row i of either has label i; the pair (i, i) counts too, as that of a record and its perturbed copy.
    """
    member = _members(labels)
    first, second = (member.T @ unit(each.detach().double()) for each in (features, others))
    return float((first * second).sum() / member.sum(0).square().sum())


def _members(labels: Tensor) -> Tensor:
    """[N, C] float64: which record is in which of the C classes that are present."""
    _, place = labels.unique(return_inverse=True)
    return one_hot(place).double()
