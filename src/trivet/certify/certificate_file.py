"""Certificates on disk: with everything needed to judge them, to compute them again, and to tell whose they are."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from trivet.certify.certifier import Certificates, Certifier
from trivet.errors import BadValue, TrivetError, require
from trivet.files import read_json, write_json
from trivet.methods import build, spec_of


class _Point(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    index: int
    target: int
    label: int
    radius: float
    evidence: dict[str, int | float]


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    format: Literal[1]
    certifier: dict[str, Any]
    norm: str
    alpha: float
    seed: int
    artefact: str
    code: str
    conditions: tuple[str, ...]
    points: list[_Point]


@dataclass(frozen=True, eq=False)
class CertificateFile:
    """What a certificate file holds.

    Attributes:
        certificates: of N inputs.
        targets: [N] int64, the true labels.
        certifier: with every setting the certificates were obtained with.
        seed: of the run that drew the noise.
        artefact: the fingerprint of the model the certificates are about; they say nothing about any other.
        code: version of Trivet that computed them.
    """

    certificates: Certificates
    targets: Tensor
    certifier: Certifier
    seed: int
    artefact: str
    code: str = field(default_factory=lambda: importlib.metadata.version("trivet"))

    def save(self, path: Path) -> None:
        """Write everything as JSON, radii in full precision."""
        certificates = self.certificates
        require(len(certificates) > 0, "there are no certificates to save; certify at least one input.")
        require(
            self.targets.shape == certificates.labels.shape,
            f"{len(certificates)} certificates but targets of shape {tuple(self.targets.shape)}.",
        )
        require(self.certifier.follows(certificates), "these certificates do not follow from the certifier's settings.")
        evidence = {name: values.tolist() for name, values in certificates.evidence.items()}
        columns = (certificates.index, self.targets, certificates.labels, certificates.radii)
        content = {
            "format": 1,
            "certifier": spec_of(self.certifier),
            "norm": certificates.norm,
            "alpha": certificates.alpha,
            "seed": self.seed,
            "artefact": self.artefact,
            "code": self.code,
            "conditions": list(certificates.conditions),
            "points": [
                {
                    "index": index,
                    "target": target,
                    "label": label,
                    "radius": radius,
                    "evidence": {name: values[row] for name, values in evidence.items()},
                }
                for row, (index, target, label, radius) in enumerate(
                    zip(*(column.tolist() for column in columns), strict=True)
                )
            ],
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: Path, artefact: str | None = None) -> CertificateFile:
        """The content of `path`, checked: complete, about the weights `artefact` (if given), radii as the counts allow.

        Raises:
            TrivetError: a file that lacks any setting, is about other weights, or claims more than its evidence.
        """
        try:
            content = _Content.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TrivetError(f"{path} is no certificate file ({where}: {first['msg']}); certify again.") from None
        if artefact is not None and artefact != content.artefact:
            raise TrivetError(
                f"{path} is about the weights {content.artefact[:12]}, not {artefact[:12]}; certify the model at hand."
            )
        certifier = _certifier(path, content.certifier)
        certificates = _certificates(path, content)
        if not certifier.follows(certificates):
            raise TrivetError(
                f"{path} claims radii that do not follow from its counts and settings; do not trust it, certify again."
            )
        targets = torch.tensor([point.target for point in content.points], dtype=torch.int64)
        return cls(certificates, targets, certifier, content.seed, content.artefact, content.code)


def _certifier(path: Path, spec: dict[str, Any]) -> Certifier:
    try:
        certifier: Certifier = build("certify", spec)
    except BadValue as error:
        raise TrivetError(f"{path} names a certifier that cannot be made: {error}") from None
    missing = spec_of(certifier).keys() - spec.keys()
    if missing:  # a default filled in now need not be the value used then
        raise TrivetError(f"{path} does not say with which {', '.join(sorted(missing))} it was made; certify again.")
    return certifier


def _certificates(path: Path, content: _Content) -> Certificates:
    points = content.points
    names = points[0].evidence.keys() if points else ()
    try:
        return Certificates(
            torch.tensor([point.index for point in points], dtype=torch.int64),
            torch.tensor([point.label for point in points], dtype=torch.int64),
            torch.tensor([point.radius for point in points], dtype=torch.float64),
            content.norm,
            content.alpha,
            content.conditions,
            {name: _column([point.evidence[name] for point in points]) for name in names},
        )
    except (BadValue, KeyError) as error:
        raise TrivetError(f"{path} holds no valid certificates: {error}") from None


def _column(values: list[int | float]) -> Tensor:
    """[N] int64 where all are counts, else float64: radii must follow from the numbers themselves, not from float32."""
    exact = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if exact else torch.float64)
