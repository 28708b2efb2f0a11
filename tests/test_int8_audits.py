"""An eight-bit file is attacked and certified as its runtime answers, and the claims are bound to its hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trivet import api, exporting
from trivet.audit.subject import Subject
from trivet.certify.certifier import ABSTAIN, Certificates
from trivet.certify.crown import CrownIbp
from trivet.claims import CertificateClaim
from trivet.files import sha256
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.twinned import Twinned
from trivet.runs import Run, Target

pytest.importorskip("onnx")

EPS = 0.03
RECIPE = f"""\
name: small
about: A recipe for tests.
data: {{name: digits, train_limit: 900, test_limit: 120}}
model: {{name: mlp}}
threat: {{name: linf, eps: {EPS}}}
stages:
  - fit: {{objective: {{name: ibp, ramp: [0, 0.5]}}, epochs: 12, batch_size: 50, optimizer: {{name: adam, lr: 3e-3}}}}
audit:
  attacks: [{{name: pgd, steps: 10}}, {{name: square, queries: 50}}]
  certificate: {{name: crown_ibp, eps: {EPS}}}
  curve: [0]
  curve_points: 8
  diagnosis: 5
  explanations: 0
  latency: []
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(RECIPE)
    return api.train_model(folder / "small.yaml", out=folder / "small")


@pytest.fixture(scope="module")
def file(run: Run) -> exporting.Exported:
    return api.export_model(run.folder.path, to="onnx", int8=True)


@pytest.fixture(scope="module")
def audited(file: exporting.Exported) -> Subject:
    return api.audit_model(file.path)


def certified(run: Run, file: exporting.Exported) -> tuple[Twinned, torch.Tensor, torch.Tensor, list[Certificates]]:
    """The file's model, the test records, and certificates of the trained model and of the file."""
    found = Target.open(file.path, recipe=None, data=None, overrides=(), out=None, trust_code=False, device="cpu")
    batch = found.test.batch(torch.arange(len(found.test)))
    assert isinstance(found.model, Twinned)
    models = (run.model(found.test), found.model)
    return found.model, batch.inputs, batch.labels, [CrownIbp(EPS).certify(each, batch.inputs) for each in models]


def test_certified_accuracy_is_claimed_for_the_file_below_what_attacks_leave(
    file: exporting.Exported, audited: Subject
) -> None:
    findings = audited.findings
    assert findings.certificate is not None
    assert findings.worst_case is not None
    proved = findings.certificate.at[0].accuracy
    assert 60 < proved.successes <= findings.worst_case.successes <= findings.clean.successes
    assert not [each.name for each in findings.checks if each.severity == "error" and each.raised]
    (claim,) = (each for each in audited.claims if isinstance(each, CertificateClaim))
    assert claim.artefact == file.sha256 == sha256(Path(file.path))
    assert claim.value == pytest.approx(100 * proved.successes / proved.trials)
    assert claim.voided is None
    assert any("ONNX Runtime" in each for each in claim.conditions)
    assert any("the file's own answers" in each for each in claim.conditions)


def test_eight_bits_lose_little_of_what_is_certified_of_the_trained_model(run: Run, file: exporting.Exported) -> None:
    _, _, labels, (in_float, in_eight_bits) = certified(run, file)
    right = [int(((each.labels == labels) & (each.radii > 0)).sum()) for each in (in_float, in_eight_bits)]
    assert right[0] > 60
    assert abs(right[0] - right[1]) <= 8  # of 120; measured: 2


def test_what_is_certified_is_what_the_runtime_answers_and_no_try_there_changes_it(
    run: Run, file: exporting.Exported
) -> None:
    model, x, _, (_, found) = certified(run, file)
    runtime = OnnxRuntimeModel(file.path)
    with torch.no_grad():
        held = found.labels != ABSTAIN
        assert torch.equal(found.labels[held], runtime(x).argmax(1)[held])
        draw = torch.Generator().manual_seed(0)
        at = x[held]
        radius = EPS * (1 - 1e-6)
        for sharp in (True, False):
            moves = torch.rand(100, *at.shape, generator=draw) * 2 - 1
            points = (at + radius * (moves.sign() if sharp else moves)).clamp(0, 1)
            assert bool((runtime(points.flatten(0, 1)).argmax(1).view(100, -1) == found.labels[held]).all())
    for _ in range(3):
        moved = (at + radius * (torch.rand(at.shape, generator=draw) * 2 - 1)).clamp(0, 1)
        for _ in range(15):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                torch.nn.functional.cross_entropy(model(moved), found.labels[held], reduction="sum"), moved
            )
            stepped = moved.detach() + radius / 4 * gradient.sign()
            moved = torch.minimum(torch.maximum(stepped, at - radius), at + radius).clamp(0, 1)
            with torch.no_grad():
                assert torch.equal(runtime(moved).argmax(1), found.labels[held])
