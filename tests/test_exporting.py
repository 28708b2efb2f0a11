"""Exported files answer as the model does, are claimed for by their hash, and lose their claims when touched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivet import api, exporting
from trivet.claims import Claim, Ledger, PrivacyClaim
from trivet.cli import main
from trivet.compression.cost import Latency
from trivet.compression.runtime import COMPILED, SIMULATED, footprint, runtime_latency
from trivet.compression.tensorization import Tensorization
from trivet.errors import BadValue, TrivetError
from trivet.files import load_tensors, sha256
from trivet.models.foreign.export import is_quantized, onnx_bytes, pt2_bytes
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.quantized import Quantize
from trivet.models.foreign.twinned import Twinned
from trivet.models.small_cnn import small_cnn
from trivet.runs import Run, Target
from trivet.training.pipeline import load_into

onnx = pytest.importorskip("onnx")

RECIPE = """\
name: tiny
about: A recipe for tests.
data: {name: digits, train_limit: 200, test_limit: 60}
model: {name: small_cnn}
threat: {name: linf, eps: 0.1}
stages:
  - fit: {objective: plain, epochs: 4, batch_size: 50, optimizer: {name: adam, lr: 5e-3}}
audit:
  attacks: [{name: pgd, steps: 3}, {name: square, queries: 20}]
  points: 40
  curve: [0]
  curve_points: 8
  diagnosis: 0
  explanations: 0
  latency: []
  leaks: [{name: one_run, canaries: 20}]
"""
PROMISE = PrivacyClaim(
    statement="(3, 1e-5)-differential privacy.",
    value=3.0,
    unit="epsilon",
    obtained={"name": "dp_sgd"},
    recheck="trivet privacy tiny",
    artefact="0" * 64,
    made_by="fit",
    delta=1e-5,
    adjacency="add_remove",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose ledger promises privacy."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(RECIPE)
    made = api.train_model(folder / "tiny.yaml", out=folder / "tiny")
    ledger = made.claims
    ledger.add(PROMISE)
    ledger.save(made.folder.claims)
    return made


@pytest.fixture(scope="module")
def in_float(run: Run) -> exporting.Exported:
    return api.export_model(run.folder.path, to="onnx")


@pytest.fixture(scope="module")
def in_eight_bits(run: Run) -> exporting.Exported:
    return api.export_model(run.folder.path, to="onnx", int8=True)


def records_of(run: Run) -> tuple[Tensor, Tensor]:
    test = run.plan.splits().test
    batch = test.batch(torch.arange(len(test)))
    return batch.inputs, batch.labels


def ledger_of(path: str | Path) -> Ledger:
    return Ledger.load(Path(f"{path}.audit") / "claims.json")


def privacy_of(path: str | Path) -> Claim:
    (claim,) = privacy_of_all(path)
    return claim


def privacy_of_all(path: str | Path) -> list[Claim]:
    return [each for each in ledger_of(path).claims if isinstance(each, PrivacyClaim)]


def test_a_float_file_answers_within_the_stated_bound_on_every_record(run: Run, in_float: exporting.Exported) -> None:
    inputs, labels = records_of(run)
    model = run.model(run.plan.splits().test)
    with torch.no_grad():
        ours, theirs = model(inputs), OnnxRuntimeModel(in_float.path)(inputs)
    assert in_float.points == len(inputs) == 60
    assert in_float.max_difference == pytest.approx(float((ours - theirs).abs().max()), rel=1e-3, abs=1e-6)
    assert in_float.max_difference <= 1e-4 * max(1.0, in_float.largest)
    assert in_float.disagreements == int((ours.argmax(1) != theirs.argmax(1)).sum()) == 0
    assert in_float.exported == int((theirs.argmax(1) == labels).sum())
    assert in_float.bytes == Path(in_float.path).stat().st_size
    assert in_float.sha256 == sha256(Path(in_float.path))


def test_eight_bits_hold_each_weight_to_half_a_step(run: Run, in_eight_bits: exporting.Exported) -> None:
    """Read off the file by another reader: level times step is within half a step of the trained weight."""
    proto = onnx.load(in_eight_bits.path)
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    weights = load_tensors(run.folder.weights)[0]
    for layer in ("conv1", "conv2"):
        scale, levels = stored[f"{layer}.weight_scale"], stored[f"{layer}.weight_quantized"]
        assert levels.dtype == np.int8
        steps = scale.reshape(-1, 1, 1, 1)
        assert (np.abs(levels * steps - weights[f"{layer}.weight"].numpy()) <= 0.5001 * steps).all()
    assert in_eight_bits.bytes < 0.5 * sum(each.nbytes for each in weights.values())
    assert is_quantized(Path(in_eight_bits.path).read_bytes())
    assert in_eight_bits.disagreements <= 6  # measured: 0


def test_the_twin_of_an_eight_bit_file_answers_as_the_runtime_and_has_gradients(
    run: Run, in_eight_bits: exporting.Exported
) -> None:
    inputs, _ = records_of(run)
    found = Target.open(
        in_eight_bits.path, recipe=None, data=None, overrides=(), out=None, trust_code=False, device="cpu"
    )
    assert isinstance(found.model, Twinned)
    with torch.no_grad():
        runtime, twin = OnnxRuntimeModel(in_eight_bits.path)(inputs), found.model.twin(inputs)
        assert torch.equal(found.model(inputs), runtime)
    step = max(float(each.scale.max()) for each in found.model.twin.modules() if isinstance(each, Quantize))
    assert float((runtime - twin).abs().max()) <= 2 * step
    float_net = run.model(run.plan.splits().test)
    directions = []
    for net in (found.model, float_net):
        x = inputs.clone().requires_grad_()
        directions.append(torch.autograd.grad(net(x).logsumexp(1).sum(), x)[0].flatten(1))
    assert float(torch.cosine_similarity(*directions, dim=1).mean()) > 0.7


def test_straight_through_in_closed_form() -> None:
    layer = Quantize(torch.tensor(0.5), torch.tensor(10.0), 0, 20)
    x = torch.tensor([-9.0, -0.26, 0.0, 0.24, 0.75, 1.25, 9.0], requires_grad=True)
    levels = layer(x)
    assert levels.tolist() == [0, 9, 10, 10, 12, 12, 20]  # ties to even
    (gradient,) = torch.autograd.grad(levels.sum(), x)
    assert gradient.tolist() == [0, 2, 2, 2, 2, 2, 0]


def test_with_a_gradient_the_twin_speaks_and_without_the_runtime() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 2), 7.0)

    both = Twinned(nn.Linear(3, 2), Constant())
    x = torch.rand(4, 3)
    assert torch.equal(both(x), torch.full((4, 2), 7.0))
    assert torch.equal(both(x.clone().requires_grad_()), both.twin(x))
    with torch.no_grad():
        assert torch.equal(both(x.clone().requires_grad_()), torch.full((4, 2), 7.0))


def test_a_packed_file_gives_every_bit_back(run: Run, tmp_path: Path) -> None:
    made = api.export_model(run.folder.path, to="packed", out=tmp_path / "small.safetensors")
    assert (made.max_difference, made.disagreements) == (0.0, 0)
    assert made.bytes == (tmp_path / "small.safetensors").stat().st_size
    fresh = run.plan.model(run.plan.splits().test, 99)
    load_into(fresh, tmp_path / "small.safetensors")
    weights = load_tensors(run.folder.weights)[0]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in fresh.state_dict().items())


def test_a_torch_export_file_is_exact_and_read_without_unpickling(run: Run, tmp_path: Path) -> None:
    made = api.export_model(run.folder.path, to="pt2", out=tmp_path / "m.pt2")
    assert made.max_difference <= 1e-6
    inputs, labels = records_of(run)
    assert int((load_model(tmp_path / "m.pt2")(inputs).argmax(1) == labels).sum()) == made.exported == made.trained


def test_an_archive_in_eight_bits_is_attacked_as_it_is_written(run: Run, tmp_path: Path) -> None:
    """By gradients straight through its rounding, and by questions to its own operators; privacy as for ONNX."""
    pytest.importorskip("torchao", reason="what quantises archives")
    path = tmp_path / "m.pt2"
    made = api.export_model(run.folder.path, to="pt2", int8=True, calibrate_on="digits", out=path)
    inputs, labels = records_of(run)
    with torch.no_grad():
        answers = ExportedModel(path)(inputs)
        ours = run.model(run.plan.splits().test)(inputs)
    assert (made.format, made.points, made.bytes) == ("pt2 int8", 60, path.stat().st_size)
    assert made.exported == int((answers.argmax(1) == labels).sum())
    assert made.max_difference == pytest.approx(float((answers - ours).abs().max()), rel=1e-3)
    assert 0 < made.max_difference < 0.2 * made.largest  # measured: 0.02
    assert made.disagreements <= 6  # measured: 0
    assert privacy_of(path).holds
    found = Target.open(path, recipe=None, data=None, overrides=(), out=None, trust_code=False, device="cpu")
    assert isinstance(found.model, Twinned)
    assert isinstance(found.model.answering, ExportedModel)
    with torch.no_grad():
        assert torch.equal(found.model(inputs), answers)
    subject = api.audit_model(path)
    assert {each.label for each in subject.findings.attacks} >= {"Square"}
    assert {each.artefact for each in ledger_of(path).holding} == {made.sha256}
    assert subject.findings.cost.packed_bytes is None
    assert subject.findings.worst_case is not None
    assert subject.findings.worst_case.successes < subject.findings.clean.successes
    again = api.export_model(run.folder.path, to="pt2", int8=True, out=path)
    assert again.sha256 != made.sha256  # other records, other ranges
    voided = privacy_of_all(path)
    assert [claim.voided is None for claim in voided] == [False, False]


def test_an_eight_bit_file_is_timed_in_its_runtime(run: Run, tmp_path: Path) -> None:
    made = api.export_model(run.folder.path, to="onnx", int8=True, out=tmp_path / "m.onnx")
    subject = api.audit_model(made.path, overrides=["audit.latency=[2]", "audit.points=4"])
    (timed,) = subject.findings.cost.latency
    assert (timed.path, timed.batch_size) == ("ONNX Runtime", 2)
    (said,) = [each.statement for each in subject.claims if each.holds and "batch of 2" in each.statement]
    assert "runs in ONNX Runtime) on" in said


def test_a_compiled_program_is_set_beside_the_file_as_it_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table and sentences for people, from figures that are given here."""
    timed = Latency(0.002, 0.001, 0.003, 8, 1, 30, COMPILED, "a processor")
    slow = replace(timed, path=SIMULATED)
    base = exporting.Exported("m.pt2", "0", 1, "pt2 int8", 60, 0.1, 5.0, 1, 50, 49, (), "")
    compiled = replace(base, measured=(exporting.Measured(COMPILED, timed, None, 3),))
    said = "\n".join(exporting.summary(compiled))
    assert "labels so many otherwise than as written: 3 (batches of 8)" in said
    assert exporting.rows(compiled)[0] == {
        "runs in": "PyTorch, compiled", "batch": 8, "threads": 1, "ms": 2.0, "from": 1.0, "to": 3.0, "MB": None,
    }  # fmt: skip
    simulated = replace(base, measured=(exporting.Measured(SIMULATED, slow, 10**6),))
    said = "\n".join(exporting.summary(simulated))
    assert "only simulates eight bits" in said
    assert "otherwise than as written" not in said


def test_leak_tests_are_left_to_the_audit_of_the_run(run: Run, in_float: exporting.Exported) -> None:
    asked: dict[str, Any] = {"recipe": None, "data": None, "out": None, "trust_code": False, "device": "cpu"}
    opened = Target.open(in_float.path, overrides=[], **asked)
    assert run.plan.audit.leaks
    assert not opened.plan.audit.leaks
    with pytest.raises(TrivetError, match="leak tests repeat the training"):
        api.audit_model(in_float.path, overrides=["audit.leaks=[{name: one_run, canaries: 20}]"])


def test_claims_are_about_the_file_and_end_with_its_content(in_eight_bits: exporting.Exported) -> None:
    path = Path(in_eight_bits.path)
    before = ledger_of(path).holding
    assert {claim.artefact for claim in before} == {in_eight_bits.sha256}
    assert {claim.made_by for claim in before} == {"export"}
    subject = api.audit_model(path)
    assert subject.findings.artefact == in_eight_bits.sha256
    held = ledger_of(path).holding
    assert {claim.artefact for claim in held} == {in_eight_bits.sha256}
    assert {claim.made_by for claim in held} == {"export", "audit"}
    assert {each.label for each in subject.findings.attacks} >= {"Square"}
    assert subject.findings.cost.file_bytes == in_eight_bits.bytes
    original = path.read_bytes()
    proto = onnx.load_model_from_string(original)
    proto.producer_name = "somebody else"  # the same function in other bytes is another file
    try:
        path.write_bytes(proto.SerializeToString())
        api.audit_model(path)
        after = ledger_of(path)
        assert {claim.artefact for claim in after.holding} == {sha256(path)} != {in_eight_bits.sha256}
        ended = [claim for claim in after.claims if claim.artefact == in_eight_bits.sha256]
        assert len(ended) >= len(held)
        reasons = {claim.voided.reason for claim in ended if claim.voided is not None and claim.made_by == "export"}
        assert "the file is not the one it was made for" in reasons
    finally:
        path.write_bytes(original)


def test_privacy_goes_along_but_not_past_ranges_read_off_the_records(
    run: Run, in_float: exporting.Exported, in_eight_bits: exporting.Exported, tmp_path: Path
) -> None:
    kept = privacy_of(in_float.path)
    assert kept.holds
    assert (kept.value, kept.artefact) == (3.0, in_float.sha256)
    assert in_float.privacy.startswith("the run's privacy claim holds")
    ended = privacy_of(in_eight_bits.path)
    assert ended.voided is not None
    assert (ended.voided.stage, ended.artefact) == ("export", in_eight_bits.sha256)
    assert "no privacy claim" in in_eight_bits.privacy
    public = api.export_model(
        run.folder.path, to="onnx", int8=True, calibrate_on="digits", out=tmp_path / "public.onnx"
    )
    assert privacy_of(public.path).holds


def test_a_file_that_answers_otherwise_is_not_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, input_shape: tuple[int, ...]) -> bytes:
        with torch.no_grad():
            for each in model.parameters():
                each.mul_(1.01)
        return pt2_bytes(model, input_shape)

    monkeypatch.setattr(exporting, "pt2_bytes", lambda _, shape: wrong(run.model(run.plan.splits().test), shape))
    with pytest.raises(TrivetError, match="differs from the model by"):
        api.export_model(run.folder.path, to="pt2", out=tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()


def test_drawn_weights_are_not_exported() -> None:
    model = small_cnn((1, 8, 8), 10)
    Tensorization(include=("conv2",), keep=0.9).attach(model)
    for write in (onnx_bytes, pt2_bytes):
        with pytest.raises(TrivetError, match="drawn anew in every pass"):
            write(model, (1, 8, 8))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"to": "onnx", "out": "m.pt2"}, "must end in .onnx"),
        ({"to": "torch"}, "to=torch must be onnx, pt2 or packed"),
        ({"to": "packed", "int8": True}, "to=packed does not go with int8"),
        ({"to": "pt2", "int8": True, "out": "m.onnx"}, "must end in .pt2"),
        ({"to": "packed", "out": "nowhere/m.safetensors"}, "is in no folder"),
    ],
)
def test_wrong_arguments_are_refused(run: Run, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        api.export_model(run.folder.path, **settings)


def test_time_and_memory_are_measured_and_say_how(in_float: exporting.Exported) -> None:
    found = runtime_latency(in_float.path, (1, 8, 8), batch_size=4, threads=1, repeats=5)
    assert (found.batch_size, found.threads, found.repeats, found.path) == (4, 1, 5, "ONNX Runtime")
    assert 0 < found.low <= found.median <= found.high
    memory = footprint(in_float.path, (1, 8, 8), batch_size=4, threads=1)
    assert memory is None or 0 < memory < 1 << 30
    with pytest.raises(BadValue, match="repeats=0 must be at least 1"):
        runtime_latency(in_float.path, (1, 8, 8), repeats=0)
    with pytest.raises(BadValue, match="runtime=jax must be"):
        footprint(in_float.path, (1, 8, 8), batch_size=1, threads=1, runtime="jax")
    with pytest.raises(BadValue, match=r"absent\.onnx is no file"):
        footprint("absent.onnx", (1, 8, 8), batch_size=1, threads=1)


def test_what_was_measured_lies_beside_the_file(in_float: exporting.Exported) -> None:
    told = json.loads((Path(f"{in_float.path}.audit") / "exported.json").read_text())
    assert (told["sha256"], told["disagreements"], told["format"]) == (in_float.sha256, 0, "onnx")
    assert any("labelled otherwise" in each for each in exporting.summary(in_float))
    assert exporting.rows(in_float) == []


def test_the_command_exports_and_refuses_in_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["trivet", "--no-keep-memory", "export", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    where, file = run.folder.path, tmp_path / "p.safetensors"
    assert status(where, "--to", "packed", "--out", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == sha256(file)
    assert status(where, "--to", "packed", "--out", file) == 0
    said = capsys.readouterr().out
    assert "On all 60 test records: 0 labelled otherwise" in said
    assert "privacy claim holds for the file" in said
    for wrong, sentence in (
        (("--to", "packed", "--int8"), "to=packed does not go with int8"),
        (("--to", "onnx", "--calibrate-on", "digits"), "--calibrate-on goes with --int8"),
        (("--to", "onnx", "--int8", "--calibrate-on", "digit"), "--calibrate-on digit: data.name: there is no 'digit'"),
        (("--to", "tflite"), "to=tflite must be onnx, pt2 or packed"),
    ):
        assert status(where, *wrong) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert status(tmp_path, "--to", "packed") == 2
    assert "is not a run folder" in capsys.readouterr().err
