"""LiRA, the likelihood ratio attack (Carlini, Chien, Nasr, Song, Terzis & Tramèr, S&P 2022)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.audit.leak_finding import LeakFinding
from trivet.audit.leak_test import LeakTest, Trainer, logits
from trivet.audit.membership import Shadows, finding, train_shadows
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Splits
from trivet.errors import require
from trivet.methods import method, spec_of

_OWN_VARIANCE = 64
"""Shadow models from which a variance for each record can be estimated; with fewer, all records share one."""
_LEAST_STD = 1e-8


@method(
    title="LiRA",
    paper="Carlini et al., S&P 2022",
    year=2022,
    legs="private",
    note="an attack's success, no bound on epsilon",
)
@dataclass(frozen=True)
class Lira(LeakTest):
    """Is this confidence likelier from models that saw the record, or from models that did not?

    phi(x) = ln p_y - ln(1 - p_y) = z_y - logsumexp_{k != y} z_k, in float64, is close to normal over models. With
    normals fitted to the shadow models that saw x and to those that did not (medians as means),

        online: ln N(phi; mu_in, s_in) - ln N(phi; mu_out, s_out);   offline: Phi((phi - mu_out) / s_out).

    With fewer than 64 shadow models one variance of each kind, pooled about every record's own mean, serves all
    records. One query of the record as it is; the paper also averages over augmentations.

    Promised: the rates of this attack, at thresholds chosen on other records. Other attacks may do better, and
    these rates bound no epsilon.

    Attributes:
        shadows: models to train besides the attacked one, an even number.
        mode: "offline" uses only shadow models that did not see a record.
        records: attack the first so many training records; None for all.
    """

    shadows: int = 16
    mode: str = "online"
    records: int | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require(
            self.shadows >= 4 and self.shadows % 2 == 0,
            f"shadows={self.shadows} must be even and at least 4: half of them see a record, and two make a variance.",
        )
        require(self.mode in ("online", "offline"), f"mode={self.mode!r} must be 'online' or 'offline'.")
        require(self.records is None or self.records >= 4, f"records={self.records} must be at least 4.")
        require(0 < self.confidence < 1, f"confidence={self.confidence} must lie strictly between 0 and 1.")

    def run(self, trainer: Trainer, data: Splits, *, seed: int, claimed: PrivacyClaim | None = None) -> LeakFinding:
        began = time.perf_counter()
        pool = data.train.select(slice(0, self.records))
        found = train_shadows(
            trainer, pool, self.shadows, seed, lambda model: logit_gap(logits(model, pool), pool.labels), "LiRA"
        )
        scores = self.scores(found)
        return finding(
            scores,
            found,
            label=f"LiRA ({self.mode})",
            spec=spec_of(self),
            confidence=self.confidence,
            seed=seed,
            seconds=time.perf_counter() - began,
            claimed=claimed,
        )

    def scores(self, shadows: Shadows) -> Tensor:
        """[N] float64, larger for members."""
        out_mean, out_std = _normals(shadows.signal, ~shadows.inside)
        if self.mode == "offline":
            return torch.special.ndtr((shadows.target - out_mean) / out_std)
        in_mean, in_std = _normals(shadows.signal, shadows.inside)
        return _log_normal(shadows.target, in_mean, in_std) - _log_normal(shadows.target, out_mean, out_std)


def logit_gap(z: Tensor, y: Tensor) -> Tensor:
    """ln p_y - ln(1 - p_y) of logits [N, K], computed without ever forming p_y, which rounds to 1: [N] float64."""
    z = z.double()
    return z.gather(1, y[:, None]).squeeze(1) - z.scatter(1, y[:, None], -torch.inf).logsumexp(1)


def _normals(signal: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Median and standard deviation [N] of the chosen entries of each column of `signal` [S, N]."""
    values = torch.where(chosen, signal, torch.nan)
    counts = chosen.sum(0)
    median = values.nanquantile(0.5, dim=0)  # between the middle two, where `nanmedian` takes the lower
    squares = (values - values.nanmean(0)).square().nansum(0)
    if len(signal) < _OWN_VARIANCE:
        std = (squares.sum() / (counts - 1).sum()).sqrt().expand_as(median)
    else:
        std = (squares / (counts - 1)).sqrt()
    return median, std.clamp_min(_LEAST_STD)


def _log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
