"""What certificates say about a dataset: certified accuracy by radius, its guarantee, and the average radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal

from torch import Tensor

from trivet.certify.certifier import Certificates
from trivet.errors import require
from trivet.statistics import Rate


def certified_accuracy(certificates: Certificates, targets: Tensor, radii: Sequence[float]) -> list[Rate]:
    """The share of inputs certified with the right label at each radius: label = target and R >= r.

    `targets` [N] int64. Abstentions count as wrong. The interval of each rate is about drawing the test points; for
    the chance that sampled certificates are wrong see `guaranteed_accuracy`.
    """
    right = _right(certificates, targets)
    return [Rate(int((right & (certificates.radii >= radius)).sum()), len(certificates)) for radius in radii]


def guaranteed_accuracy(certificates: Certificates, targets: Tensor, radius: float, rho: float = 0.001) -> float:
    """A lower bound, with confidence 1 - rho, on the smoothed classifier's true certified accuracy on these inputs.

    Each certificate is wrong with probability at most alpha, independently, so that the number of wrong ones is at
    most the (1 - rho)-quantile q of Binomial(N, alpha): the bound is (right and certified at `radius` - q) / N.
    Cohen et al. (2019) approximate the quantile from Bernstein's inequality; for large N alpha the expression in
    their published code falls below the true quantile, so the exact one is used. For a proof (alpha = 0) nothing
    is subtracted.
    """
    require(0 < rho < 1, f"rho={rho} must lie strictly between 0 and 1.")
    (rate,) = certified_accuracy(certificates, targets, [radius])
    if not rate.trials:
        return 0.0
    return max(0.0, (rate.successes - _most_failures(rate.trials, certificates.alpha, rho)) / rate.trials)


def _most_failures(trials: int, alpha: float, rho: float) -> int:
    """The least q with P(Binomial(trials, alpha) <= q) >= 1 - rho."""
    from scipy.stats import binom

    return int(binom.isf(rho, trials, alpha)) if alpha else 0


def average_certified_radius(certificates: Certificates, targets: Tensor) -> float:
    """ACR: the mean over all inputs of R * 1[label = target] (Zhai et al., ICLR 2020).

    It rewards huge radii on easy inputs and hides lost hard ones (Sun et al., ICML 2025): show it beside the curve and
    the abstentions, never alone.
    """
    require(len(certificates) > 0, "the average radius of no certificates is undefined; certify at least one input.")
    return float((certificates.radii * _right(certificates, targets)).mean())


def share_histogram(shares: Tensor, bins: int = 20) -> list[int]:
    """How many of `shares` [N] in [0, 1] lie in each of `bins` equal parts, which hold their lower ends; the last both.

    Of the votes for the certified classes it shows what the average radius hides: how many inputs are nearly certain,
    and how many close to a tie.
    """
    parts = (shares * bins).long().clamp(0, bins - 1)
    return [int((parts == number).sum()) for number in range(bins)]


def format_radius(radius: float, digits: int = 3) -> str:
    """`radius` with `digits` decimals, rounded down: what is printed is certified, too."""
    require(math.isfinite(radius), f"radius={radius} must be finite.")
    return str(Decimal(radius).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))


def _right(certificates: Certificates, targets: Tensor) -> Tensor:
    require(
        targets.shape == certificates.labels.shape,
        f"{len(certificates)} certificates but targets of shape {tuple(targets.shape)}.",
    )
    return certificates.labels == targets.cpu()
