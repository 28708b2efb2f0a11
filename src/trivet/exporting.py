"""Export: from a run to a file that ships, with its answers compared on every test record and claims of its own.

A claim about the run's weights is not one about the file: another program computes with it. What is measured on the
file is claimed for it, bound to its hash; privacy goes along, as post-processing does. Attacks and certificates are
made anew by auditing the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivet.audit.findings import Findings, LatencyFinding
from trivet.claims import AccuracyClaim, Claim, CostClaim, Ledger, PrivacyClaim, Voided
from trivet.compression.chains import chained
from trivet.compression.cost import Latency, measure_latency
from trivet.compression.packing import save_packed
from trivet.compression.runtime import COMPILED, SIMULATED, footprint, runner, runtime_latency
from trivet.data.dataset import Dataset, Splits
from trivet.errors import TrivetError, require
from trivet.files import load_tensors, sha256, sole_writer, write_bytes, write_json, write_text
from trivet.models.foreign.export import int8_bytes, onnx_bytes, pt2_bytes, pt2_int8_bytes
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.twinned import Twinned
from trivet.randomness import generator
from trivet.recipes.plan import plan
from trivet.recipes.recipe import load
from trivet.runs import EXPORTED, Run, audit_folder, beside
from trivet.statistics import Rate
from trivet.training.pipeline import load_into

_TOLERANCE = 1e-4
"""Of the largest logit, where that is above 1: by how much a file in float32 may differ, by rounding in other order."""
_BATCH = 256
_TRAINED = "PyTorch, as trained"
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Calibration:
    """How the ranges of eight-bit activations are found: on `records` training records of `data`, or of the run's."""

    data: str | None = None
    records: int = 512


@dataclass(frozen=True)
class Measured:
    """A way of running the file, or for comparison the trained model.

    Attributes:
        runtime: what runs it.
        latency: time of a batch.
        memory: bytes by which a fresh process grows; None where that was not measured.
        disagreements: test records that it labels otherwise than the file does as it is written; None where it is that.
    """

    runtime: str
    latency: Latency
    memory: int | None
    disagreements: int | None = None


@dataclass(frozen=True)
class Exported:
    """A file, and what was measured on it.

    Attributes:
        path, sha256, bytes: of the file.
        format: "onnx", "onnx int8", "pt2", "pt2 int8" or "packed".
        points: test records it was compared on: all there are.
        max_difference: of any logit from the trained model's.
        largest: the largest logit of the trained model, as a measure for that.
        disagreements: records labelled otherwise.
        trained, exported: correctly labelled records.
        measured: the file in its runtime, and the trained model in PyTorch.
        privacy: what becomes of the run's privacy claim; empty if it has none.
    """

    path: str
    sha256: str
    bytes: int
    format: str
    points: int
    max_difference: float
    largest: float
    disagreements: int
    trained: int
    exported: int
    measured: tuple[Measured, ...]
    privacy: str


def export_run(run: Run, to: str, calibration: Calibration | None, out: str | Path | None) -> Exported:
    """What `api.export_model` does."""
    require(to in ("onnx", "pt2", "packed"), f"to={to} must be onnx, pt2 or packed.")
    require(calibration is None or to != "packed", "to=packed does not go with int8; it stores weights as they are.")
    name = "packed.safetensors" if to == "packed" else f"model{'-int8' if calibration else ''}.{to}"
    path = Path(out) if out is not None else run.folder.path / name
    require(path.suffix == Path(name).suffix, f"out={path} must end in {Path(name).suffix}.")
    require(path.parent.is_dir(), f"out={path} is in no folder; make {path.parent} first.")
    if run.is_policy:
        raise TrivetError(f"{run.folder.path} is a policy; what is exported is a model that labels records.")
    splits = run.plan.splits()
    model = run.model(splits.test)
    first = splits.test.batch(torch.arange(min(2, len(splits.test)))).inputs
    with torch.no_grad():
        if not torch.equal(model(first), model(first)):
            raise TrivetError(f"{run.name} draws at random, and no file would answer as it does; it stays here.")
    _write(path, run, model, splits, to, calibration)
    try:
        compared = _compared(model, _opened(path, run, splits.test), splits.test, exact=calibration is None)
    except TrivetError:
        path.unlink()
        raise
    held = [claim for claim in run.claims.holding if isinstance(claim, PrivacyClaim)]
    private = bool(held) and calibration is not None and calibration.data is None
    made = Exported(
        path=str(path),
        sha256=sha256(path),
        bytes=path.stat().st_size,
        format=f"{to} int8" if calibration else to,
        measured=_measured(path, model, run, splits.test, to, calibration is None),
        privacy=_standing(held, private),
        **compared,
    )
    _claim(made, run, splits.test, held, private)
    return made


def about_file(findings: Findings, path: Path, model: nn.Module, ledger: Ledger) -> Findings:
    """Findings bound to the file they were made on, by its hash; claims about another content of it end.

    Sizes are the file's. Where the file computes in eight bits, its time is that in its runtime, and what a twin in
    float32 would take is left out.
    """
    artefact = sha256(path)
    for claim in ledger.holding:
        if claim.artefact != artefact:
            ledger.void(claim, "audit", "the file is not the one it was made for")
    sizes: dict[str, Any] = {"file_bytes": path.stat().st_size, "file_format": path.suffix.removeprefix(".")}
    if isinstance(model, Twinned):
        twin: Any = model.twin
        shape = twin.meta["input_shape"]
        timed = [runtime_latency(path, shape, batch_size=each.batch_size) for each in findings.cost.latency]
        sizes["latency"] = tuple(LatencyFinding(**vars(each)) for each in timed)
        sizes |= {"packed_bytes": None, "compressed_bytes": None, "bits_per_weight": None, "energy": None}
    return findings.model_copy(update={"artefact": artefact, "cost": findings.cost.model_copy(update=sizes)})


def _write(path: Path, run: Run, model: nn.Module, splits: Splits, to: str, calibration: Calibration | None) -> None:
    shape = splits.test.input_shape
    if to == "packed":
        structure = _structure(run)
        save_packed(path, model.state_dict(), {"history": run.history, "structure": structure})
        return
    model = chained(model, shape)
    if calibration is None:
        content = onnx_bytes(model, shape) if to == "onnx" else pt2_bytes(model, shape)
    else:
        batches = _calibrating(run, splits, calibration)
        in_onnx = to == "onnx"
        content = int8_bytes(onnx_bytes(model, shape), batches) if in_onnx else pt2_int8_bytes(model, shape, batches)
    write_bytes(path, content)


def _structure(run: Run) -> list[dict[str, Any]]:
    structure: list[dict[str, Any]] = load_tensors(run.folder.weights)[1].get("structure", [])
    return structure


def _calibrating(run: Run, splits: Splits, how: Calibration) -> Iterator[Tensor]:
    """Batches of training records drawn without replacement."""
    train = splits.train
    if how.data is not None:
        try:
            train = plan(load("audit", data=how.data)).splits().train
        except TrivetError as error:
            raise TrivetError(str(error).replace("--data", "--calibrate-on", 1)) from None
        require(
            train.input_shape == splits.test.input_shape,
            f"calibrate_on={how.data} has records of shape {train.input_shape}, and the model takes "
            f"{splits.test.input_shape}.",
        )
    drawn = torch.randperm(len(train), generator=generator(run.plan.recipe.seed, "calibration"))[: how.records]
    return (train.batch(part).inputs for part in drawn.split(64))


def _opened(path: Path, run: Run, like: Dataset) -> Callable[[Tensor], Tensor]:
    """The file as it is used: in its runtime, or read again."""
    if path.suffix == ".onnx":
        return OnnxRuntimeModel(path)
    if path.suffix == ".pt2":
        return ExportedModel(path)
    fresh = run.plan.model(like)
    load_into(fresh, path)
    return fresh.eval()


@torch.no_grad()
def _compared(model: nn.Module, file: Callable[[Tensor], Tensor], test: Dataset, *, exact: bool) -> dict[str, Any]:
    """Both on all test records; an exact format that differs by more than rounding is an error."""
    difference = largest = 0.0
    disagreements = trained = exported = 0
    for part in torch.arange(len(test)).split(_BATCH):
        batch = test.batch(part)
        ours, theirs = model(batch.inputs), file(batch.inputs)
        difference = max(difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(ours.abs().max()))
        disagreements += int((ours.argmax(1) != theirs.argmax(1)).sum())
        trained += int((ours.argmax(1) == batch.labels).sum())
        exported += int((theirs.argmax(1) == batch.labels).sum())
    if exact and not difference <= _TOLERANCE * max(1.0, largest):
        raise TrivetError(
            f"the exported file differs from the model by {difference:.3g} in a logit, more than rounding explains "
            f"({_TOLERANCE:g} of {max(1.0, largest):.3g}); it is not kept."
        )
    return {
        "points": len(test),
        "max_difference": difference,
        "largest": largest,
        "disagreements": disagreements,
        "trained": trained,
        "exported": exported,
    }


def _measured(path: Path, model: nn.Module, run: Run, test: Dataset, to: str, exact: bool) -> tuple[Measured, ...]:
    found = []
    shape, threads = test.input_shape, torch.get_num_threads()
    for size in run.plan.audit.latency:
        if to == "onnx" or not exact:
            timed = runtime_latency(path, shape, batch_size=size)
            compiled = timed.path == COMPILED  # a fresh process would grow by what the compiler takes
            reader = "onnxruntime" if to == "onnx" else "exported"
            memory = None if compiled else footprint(path, shape, batch_size=size, threads=threads, runtime=reader)
            found.append(Measured(timed.path, timed, memory, _differing(path, test, size) if compiled else None))
        readable = to != "packed" and exact
        memory = footprint(path, shape, batch_size=size, threads=threads, runtime="torch") if readable else None
        found.append(Measured(_TRAINED, measure_latency(model, shape, batch_size=size), memory))
    return tuple(found)


def _differing(path: Path, test: Dataset, batch_size: int) -> int:
    """Test records that the compiled program labels otherwise than the program as it is written."""
    written, compiled = ExportedModel(path), runner(path, batch_size)[0]
    parts = [test.batch(part).inputs for part in torch.arange(len(test)).split(_BATCH)]
    return sum(int((written(x).argmax(1) != compiled(x).argmax(1)).sum()) for x in parts)


def rows(made: Exported) -> list[dict[str, Any]]:
    """The measured runs, one a row, for people."""
    return [
        {
            "runs in": each.runtime,
            "batch": each.latency.batch_size,
            "threads": each.latency.threads,
            "ms": float(f"{1e3 * each.latency.median:.3g}"),
            "from": float(f"{1e3 * each.latency.low:.3g}"),
            "to": float(f"{1e3 * each.latency.high:.3g}"),
            "MB": None if each.memory is None else round(each.memory / 1e6, 1),
        }
        for each in made.measured
    ]


def summary(made: Exported) -> list[str]:
    """What was found, in sentences."""
    said = [
        f"On all {made.points} test records: {made.disagreements} labelled otherwise; logits differ by "
        f"{made.max_difference:.3g} at most, where the largest is {made.largest:.3g}.",
        f"Correct: {made.exported} in the file, {made.trained} in the trained model.",
    ]
    differing = [each for each in made.measured if each.disagreements is not None]
    if differing:
        counts = ", ".join(f"{each.disagreements} (batches of {each.latency.batch_size})" for each in differing)
        said.append(f"Compiled, which multiplies integers, it labels so many otherwise than as written: {counts}.")
    if any(each.latency.path == SIMULATED for each in made.measured):
        said.append("No C++ compiler serves here, and as written PyTorch only simulates eight bits, slowly.")
    if made.privacy:
        said.append(f"Privacy: {made.privacy}.")
    return [*said, f"next:    trivet audit {made.path}"]


def _standing(held: list[PrivacyClaim], ended: bool) -> str:
    if not held:
        return ""
    if ended:
        return "the file has no privacy claim: its ranges were read off the private records; name public ones instead"
    return "the run's privacy claim holds for the file, which is made from its weights alone"


def _claim(made: Exported, run: Run, test: Dataset, held: list[PrivacyClaim], ended: bool) -> None:
    """Enter the file's claims into the ledger in the folder beside it, and what an audit needs to judge it."""
    folder = beside(audit_folder(made.path, None), run.plan)
    with sole_writer(folder.path):
        ledger = Ledger.load(folder.claims) if folder.claims.exists() else Ledger()
        for claim in ledger.holding:
            ledger.void(claim, "export", "the file was exported again")
        ledger.add(*_claims(made, test))
        reason = Voided(stage="export", reason="activation ranges were read off the private records, without noise")
        ledger.claims += tuple(
            claim.model_copy(update={"artefact": made.sha256, "voided": reason if ended else None}) for claim in held
        )
        write_text(folder.recipe, run.source.dump())
        write_json(folder.path / EXPORTED, {"run": str(run.folder.path), **asdict(made)})
        ledger.save(folder.claims)


def _claims(made: Exported, test: Dataset) -> list[Claim]:
    common: dict[str, Any] = {"made_by": "export", "artefact": made.sha256, "recheck": f"trivet audit {made.path}"}
    rate = Rate(made.exported, made.points, _CONFIDENCE)
    low, high = rate.interval
    accuracy = AccuracyClaim(
        statement=f"The file labels {100 * rate.value:.1f} % of all {made.points} test records of {test.name} "
        f"correctly, the trained model {100 * made.trained / made.points:.1f} %; {made.disagreements} labels differ.",
        value=100 * rate.value,
        unit="%",
        interval=(100 * low, 100 * high),
        confidence=_CONFIDENCE,
        obtained={"name": "export", "format": made.format, "data": {"name": test.name, "digest": test.digest()}},
        conditions=(
            f"no logit differs from the trained model's by more than {made.max_difference:.3g} on these records, "
            f"where the largest is {made.largest:.3g}",
        ),
        points=made.points,
        **common,
    )
    size = CostClaim(
        statement=f"The file takes {made.bytes:,} bytes.",
        value=float(made.bytes),
        unit="bytes",
        obtained={"name": "count", "measure": "exported_bytes"},
        measure="exported_bytes",
        **common,
    )
    return [accuracy, size, *(_timed(each, common) for each in made.measured if each.runtime != _TRAINED)]


def _timed(each: Measured, common: dict[str, Any]) -> Claim:
    found = each.latency
    where = f"{found.machine}, threads: {found.threads}"
    differing: tuple[str, ...] = ()
    if each.disagreements is not None:
        differing = (f"so run, it labels {each.disagreements} of the test records otherwise than as written",)
    return CostClaim(
        statement=f"Answers a batch of {found.batch_size} in {1e3 * found.median:.3g} ms (median of {found.repeats} "
        f"runs in {each.runtime}) on {where}.",
        value=1e3 * found.median,
        unit="ms",
        interval=(1e3 * found.low, 1e3 * found.high),
        obtained={"name": "runtime_latency", "batch_size": found.batch_size, "machine": where},
        conditions=("the interval spans the quartiles of the runs", *differing),
        measure=f"{each.runtime} latency of a batch of {found.batch_size}",
        **common,
    )
