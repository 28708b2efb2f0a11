"""Certificate files: nothing is lost on the way, and nothing incomplete or exaggerated is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.certify.certificate_file import CertificateFile
from trivet.certify.smoothing import Smoothing
from trivet.errors import BadValue, TrivetError
from trivet.models.fingerprint import fingerprint
from trivet.randomness import generator

SMOOTHING = Smoothing(0.3, n0=50, n=500, alpha=0.01)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CertificateFile]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.normal_(generator=generator(0, "test weights"))
        model[1].bias.fill_(0.0)
    x = torch.rand(6, 1, 2, 2, generator=generator(0, "test images"))
    x[0] = 0.0  # all logits 0 in the mean, so an abstention
    certificates = SMOOTHING.certify(model, x, seed=11, index=torch.arange(6) * 5)
    written = CertificateFile(certificates, torch.tensor([0, 1, 2, 0, 1, 2]), SMOOTHING, 11, fingerprint(model))
    path = tmp_path_factory.mktemp("run") / "certificates.json"
    written.save(path)
    return path, written


def test_what_is_read_is_what_was_written(saved: tuple[Path, CertificateFile]) -> None:
    path, written = saved
    read = CertificateFile.load(path, artefact=written.artefact)
    assert (read.certifier, read.seed, read.artefact, read.code) == (SMOOTHING, 11, written.artefact, written.code)
    assert torch.equal(read.targets, written.targets)
    for column in ("index", "labels", "radii"):
        ours, theirs = getattr(read.certificates, column), getattr(written.certificates, column)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(read.certificates.evidence["count"], written.certificates.evidence["count"])
    assert read.certificates.conditions == written.certificates.conditions
    assert 0 < int(written.certificates.abstained.sum()) < 6  # the fixture holds both kinds


def _tampered(saved: tuple[Path, CertificateFile], folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(saved[0].read_text())
    change(content)
    path = folder / "changed.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("setting", ["sigma", "n0", "n", "alpha", "norm", "precision"])
def test_a_file_without_a_setting_is_refused(saved: tuple[Path, CertificateFile], tmp_path: Path, setting: str) -> None:
    path = _tampered(saved, tmp_path, lambda content: content["certifier"].pop(setting))
    with pytest.raises(TrivetError, match=setting):
        CertificateFile.load(path)


@pytest.mark.parametrize("key", ["certifier", "seed", "artefact", "code", "conditions", "norm", "alpha", "format"])
def test_a_file_without_its_provenance_is_refused(
    saved: tuple[Path, CertificateFile], tmp_path: Path, key: str
) -> None:
    path = _tampered(saved, tmp_path, lambda content: content.pop(key))
    with pytest.raises(TrivetError, match=rf"no certificate file \({key}"):
        CertificateFile.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["certifier"].update(alpha=0.001),  # the mismatch of published logs: looser alpha used
        lambda content: content["certifier"].update(sigma=0.29),
        lambda content: content["certifier"].update(norm="L1"),
        lambda content: [point.update(radius=1.001 * point["radius"]) for point in content["points"]],
        lambda content: [point["evidence"].update(count=point["evidence"]["count"] - 1) for point in content["points"]],
        lambda content: [point["evidence"].pop("count") for point in content["points"]],
    ],
)
def test_radii_that_do_not_follow_from_counts_and_settings_are_refused(
    saved: tuple[Path, CertificateFile], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(TrivetError, match="do not follow"):
        CertificateFile.load(_tampered(saved, tmp_path, change))


@pytest.mark.parametrize("radius", [-0.5, float("nan"), float("inf")])
def test_impossible_radii_are_refused(saved: tuple[Path, CertificateFile], tmp_path: Path, radius: float) -> None:
    path = _tampered(saved, tmp_path, lambda content: content["points"][0].update(radius=radius))
    with pytest.raises(TrivetError):
        CertificateFile.load(path)


def test_certificates_of_other_weights_are_refused(saved: tuple[Path, CertificateFile]) -> None:
    with pytest.raises(TrivetError, match="is about the weights"):
        CertificateFile.load(saved[0], artefact="0" * 64)


def test_exaggerated_or_empty_certificates_are_not_saved(saved: tuple[Path, CertificateFile], tmp_path: Path) -> None:
    written = saved[1]
    other = CertificateFile(written.certificates, written.targets, Smoothing(0.2, n0=50, n=500, alpha=0.01), 11, "")
    with pytest.raises(BadValue, match="do not follow"):
        other.save(tmp_path / "file.json")
    none = SMOOTHING.certify(nn.Flatten(), torch.zeros(0, 4), seed=0)
    with pytest.raises(BadValue, match="no certificates to save"):
        CertificateFile(none, torch.zeros(0, dtype=torch.int64), SMOOTHING, 0, "").save(tmp_path / "file.json")
    assert not (tmp_path / "file.json").exists()
