"""What a certifier proves on the first records, as findings: certified accuracy by radius, abstentions, ACR."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from trivet import display
from trivet.audit.findings import CertificateFinding, CertifiedPoint
from trivet.audit.labels import label_of
from trivet.certify.certifier import Certificates, Certifier, join
from trivet.certify.curves import (
    average_certified_radius,
    certified_accuracy,
    guaranteed_accuracy,
    share_histogram,
)
from trivet.data.dataset import Dataset
from trivet.methods import spec_of
from trivet.models.modes import device_of
from trivet.statistics import Rate

_CURVE_STEPS = 60
_PORTION = 64
"""Inputs handed to the certifier at once: it forms its own batches, this only bounds what lies in memory."""


def certify(certifier: Certifier, model: nn.Module, data: Dataset, *, seed: int) -> tuple[Certificates, float]:
    """Certificates for all of `data`, and the seconds they took."""
    began, parts, device = time.perf_counter(), [], device_of(model)
    with display.progress(label_of(certifier), len(data)) as advance:
        for batch in data.batches(_PORTION):
            x = batch.inputs.to(device)
            parts.append(certifier.certify(model, x, seed=seed, index=batch.index, advance=advance))
    return join(parts), time.perf_counter() - began


def finding(
    certifier: Certifier,
    certificates: Certificates,
    targets: torch.Tensor,
    radii: Sequence[float],
    seconds: float,
    confidence: float,
) -> CertificateFinding:
    """The numbers people ask of `certificates` with true labels `targets` [N] int64: at `radii`, and as a curve."""
    right = (certificates.labels == targets) & ~certificates.abstained
    farthest = float(certificates.radii[right].max()) if bool(right.any()) else 0.0
    grid = [farthest * step / _CURVE_STEPS for step in range(_CURVE_STEPS + 1)] if farthest else [0.0]
    abstained = Rate(int(certificates.abstained.sum()), len(certificates), confidence)

    def points(at: Sequence[float]) -> tuple[CertifiedPoint, ...]:
        rates = certified_accuracy(certificates, targets, at)
        return tuple(
            CertifiedPoint(
                radius=radius,
                accuracy=Rate(rate.successes, rate.trials, confidence),
                guaranteed=guaranteed_accuracy(certificates, targets, radius),
            )
            for radius, rate in zip(at, rates, strict=True)
        )

    shares = certifier.shares(certificates)
    return CertificateFinding(
        label=label_of(certifier),
        spec=spec_of(certifier),
        norm=certificates.norm,
        alpha=certificates.alpha,
        conditions=certificates.conditions,
        at=points(radii),
        curve=points(grid),
        abstained=abstained,
        average_radius=average_certified_radius(certificates, targets),
        seconds=seconds,
        shares=None if shares is None else tuple(share_histogram(shares)),
    )
