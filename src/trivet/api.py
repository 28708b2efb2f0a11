"""The verbs of Trivet, for Python. The command line is a thin skin over these.

Verbs take and return run folders; auditing and certifying take other people's models too.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from trivet import display
from trivet.audit.claims import claims_from, recheck
from trivet.audit.leak_finding import LeakFinding
from trivet.audit.leak_test import StageTrainer
from trivet.audit.policy_audit import policy_claims, void_contradicted
from trivet.audit.policy_report import PolicySubject, render_policy
from trivet.audit.report import render
from trivet.audit.stored import Stored, in_processes
from trivet.audit.subject import Subject
from trivet.certify.certificate_file import CertificateFile
from trivet.certify.certifier import Certifier
from trivet.claims import Ledger, PrivacyClaim
from trivet.data.dataset import Splits
from trivet.errors import TrivetError, require
from trivet.exporting import Calibration, Exported, about_file, export_run
from trivet.files import save_tensors, sole_writer, write_text
from trivet.models.fingerprint import fingerprint
from trivet.models.modes import device_of
from trivet.privacy.accounting import account
from trivet.privacy.budget import grouped, spendings
from trivet.privacy.dp_sgd import customary_delta
from trivet.privacy.mechanism import Event
from trivet.recipes.plan import plan
from trivet.recipes.recipe import Source, load
from trivet.runs import Run, Target, torch_device
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.private_stage import in_all, rounded_up


def train_model(
    recipe: str | Path,
    *,
    data: str | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    trust_code: bool = False,
    device: str = "cpu",
) -> Run:
    """Run a recipe's stages; the run folder holds the model, its claims, and what is needed to repeat it.

    Args:
        recipe: a shipped recipe's name, a YAML file, or (with `resume`) a run folder.
        data: replaces the recipe's data: a source's name, a folder, an .npz file, or hub:NAME.
        out: the run folder, made if absent; runs/NAME if None.
        overrides: "key=value" strings, e.g. "fit.epochs=3" or "threat.eps=8/255".
        resume: go on with a run that was interrupted, with the recipe it was started with.
        trust_code: run code that a recipe inside a run folder names by import path.
        device: a torch device.

    Raises:
        TrivetError: anything the user can mend, before the first step where possible.
    """
    where = torch_device(device)
    from_folder = Path(recipe).is_dir()
    source = load(recipe, overrides, data=data, trust=trust_code)
    path = Path(recipe) if from_folder and out is None else Path(out or Path("runs") / source.recipe.name)
    started = resume and (path / "recipe.yaml").exists()
    if started:
        source = _resumed(path, source)
    settings = plan(source)
    if not settings.stages:
        raise TrivetError(f"{source.where} has no stages to train; it is for `trivet audit --recipe`.")
    splits: Splits | None = None
    if settings.environment is not None:
        model = settings.model(settings.environment)
    else:
        splits = settings.splits()
        model = settings.model(splits.train)
    folder = RunFolder.open(path) if started else RunFolder.create(path, source.dump())
    run_stages(settings.stages, model, splits, folder, seed=source.recipe.seed, device=where)
    return Run(folder, source)


def _resumed(path: Path, asked: Source) -> Source:
    """The recipe an interrupted run was started with; another one asked for now is refused, or it would pass for this.

    Its code may run if the recipe asked for may run the same code: who names it in his own file has read it.
    """
    started = load(path)
    if asked.recipe != started.recipe:
        raise TrivetError(
            f"{path} was started with other settings than asked for now; go on with those by "
            f"`trivet train {path} --resume`, or choose another --out."
        )
    return replace(started, trusted=asked.trusted and asked.imports() == started.imports())


def audit_model(
    target: str | Path | nn.Module,
    *,
    recipe: str | Path | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    trust_code: bool = False,
    device: str = "cpu",
) -> Subject:
    """Attack, certify and measure a model, and write findings, claims and report into its folder.

    Args:
        target: a run folder, a .pt2, .onnx or .safetensors file, or a module that maps images in [0, 1] to logits.
        recipe: for models from elsewhere: whose data, threat and audit settings to use; "audit" if None. A
            .safetensors file also needs its architecture from there.
        data: as in `train_model`.
        overrides: as in `train_model`, e.g. "audit.points=200".
        out: where to write; the run folder itself, or FILE.audit beside a model file, if None.
        trust_code: run code that a run folder's recipe names by import path.
        device: a torch device.
    """
    found = Target.open(
        target, recipe=recipe, data=data, overrides=overrides, out=out, trust_code=trust_code, device=device
    )
    if found.plan.audit.leaks and not found.is_run:
        raise TrivetError(
            f"leak tests repeat the training, and {found.name} comes without; audit its run folder, or leave them out "
            "with --set audit.leaks=[]."
        )
    folder = found.folder
    with sole_writer(folder.path):
        findings, examples = found.plan.audit.run(
            found.model,
            found.test,
            seed=found.seed,
            name=found.name,
            source=found.source,
        )
        run = Run(folder, found.plan.source)
        ledger = run.claims
        findings = findings.model_copy(update={"leaks": _leaks(found, ledger)})
        if not isinstance(target, nn.Module) and Path(target).is_file():
            findings = about_file(findings, Path(target), found.model, ledger)
        recheck(ledger, findings)
        ledger.add(*claims_from(findings, made_by="audit", recheck=found.again))
        findings.save(folder.audit)
        save_tensors(folder.examples, examples)
        ledger.save(folder.claims)
        subject = run.subject()
        write_text(folder.report, render([subject]))
    return subject


def export_model(
    run: str | Path,
    *,
    to: str,
    int8: bool = False,
    out: str | Path | None = None,
    calibrate_on: str | None = None,
    trust_code: bool = False,
) -> Exported:
    """Write a run's model to a file for a runtime, hold the file's answers against the model's, and claim for it.

    The claims lie in FILE.audit, bound to the file's hash, where `audit_model` of the file adds to them.

    Args:
        run: a run folder.
        to: "onnx", "pt2" (torch.export), or "packed" (weights in as few bytes as they need, for Trivet).
        int8: with "onnx" and "pt2", weights and activations in eight bits.
        out: the file; model.onnx, model-int8.onnx, model.pt2, model-int8.pt2 or packed.safetensors in the run folder if
            None.
        calibrate_on: with `int8`, whose training records the ranges are read off: a source of public data as in
            `train_model`; the run's own if None, which ends a privacy claim.
        trust_code: run code that the recipe names by import path.

    Raises:
        TrivetError: a model that cannot be exported, or whose file answers otherwise than it does.
    """
    return export_run(Run.open(run, trust_code=trust_code), to, Calibration(calibrate_on) if int8 else None, out)


def is_policy(target: str | Path | nn.Module) -> bool:
    """Whether `target` is the run folder of a policy, which `audit_policy` audits."""
    if isinstance(target, nn.Module) or not Path(target).is_dir():
        return False
    return Run.open(target).is_policy


def audit_policy(
    run: str | Path, *, overrides: Sequence[str] = (), trust_code: bool = False, device: str = "cpu"
) -> PolicySubject:
    """Attack a trained policy, hold its certificate against what is left, and write findings, claims and report.

    Args:
        run: a run folder whose recipe names an environment.
        overrides: as in `train_model`, e.g. "audit.episodes=1000".
        trust_code: run code that the recipe names by import path.
        device: a torch device.
    """
    opened = Run.open(run, overrides=overrides, trust_code=trust_code)
    settings, folder = opened.plan, opened.folder
    if settings.environment is None or settings.policy_audit is None:
        raise TrivetError(f"{run} is no policy; `trivet audit {run}` audits it.")
    policy = opened.model(settings.environment).to(torch_device(device))
    recorded = [each for each in opened.history if each["stage"] == "certify_policy"]
    recheck = shlex.join(["trivet", "audit", str(run), *(part for each in overrides for part in ("--set", each))])
    with sole_writer(folder.path):
        findings = settings.policy_audit.run(
            policy,
            seed=settings.recipe.seed,
            name=opened.name,
            source=str(run),
            certified=recorded[-1] if recorded else None,
        )
        ledger = opened.claims
        void_contradicted(ledger, findings)
        ledger.add(*policy_claims(findings, settings.policy_audit, recheck))
        findings.save(folder.audit)
        ledger.save(folder.claims)
        subject = opened.policy_subject()
        write_text(folder.report, render_policy(subject))
    return subject


def _leaks(found: Target, ledger: Ledger) -> tuple[LeakFinding, ...]:
    """What the recipe's leak tests find: they train its model again, on records that they have tampered with."""
    if not found.plan.audit.leaks:
        return ()
    splits = found.plan.splits()
    trainer = StageTrainer(
        found.plan.stages,
        lambda seed: found.plan.model(splits.train, seed),
        splits.test,
        found.seed,
        device_of(found.model),
        budget_of=splits.train.digest(),
    )
    # The last claim, though an earlier audit may have ended it: what was refuted once is held against it again.
    claimed = next((claim for claim in reversed(ledger.claims) if isinstance(claim, PrivacyClaim)), None)
    return tuple(test.run(trainer, splits, seed=found.seed, claimed=claimed) for test in found.plan.audit.leaks)


def certify_model(
    target: str | Path | nn.Module,
    *,
    recipe: str | Path | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    trust_code: bool = False,
    device: str = "cpu",
    certifier: Certifier | None = None,
    points: int | None = None,
    processes: int = 1,
) -> CertificateFile:
    """Certify test points one by one and write them to certificates.json; an interrupted call goes on where it was.

    Args:
        target: as in `audit_model`.
        recipe: as in `audit_model`.
        data: as in `audit_model`.
        overrides: as in `audit_model`.
        out: as in `audit_model`.
        trust_code: as in `audit_model`.
        device: as in `audit_model`.
        certifier: by default the one of the recipe's audit.
        points: the first so many test points; the recipe's `audit.certificate_points` if None.
        processes: that share the points; the certificates are those of one. Not for a module in memory.
    """
    where: dict[str, Any] = {
        "recipe": recipe,
        "data": data,
        "overrides": overrides,
        "out": out,
        "trust_code": trust_code,
    }
    found = Target.open(target, device=device, **where)
    prover = certifier or found.plan.audit.certificate
    if prover is None:
        raise TrivetError("the recipe's audit names no certificate; add one, e.g. --sigma 0.25.")
    wanted = points if points is not None else found.plan.audit.certificate_points or len(found.test)
    require(wanted >= 1, f"points={wanted} must be at least 1.")
    require(processes >= 1, f"processes={processes} must be at least 1.")
    require(
        processes == 1 or not isinstance(target, nn.Module),
        f"processes={processes} open the model from a file each; save it, or use processes=1.",
    )
    wanted = min(wanted, len(found.test))
    stored = _stored(found, prover)
    with sole_writer(found.folder.path), display.progress("certify", wanted) as advance:
        known = stored.gather()
        missing = stored.missing(known, wanted)
        advance(wanted - len(missing))
        if processes > 1 and len(missing) > 1:
            workers = min(processes, len(missing))
            task = partial(_certify_shard, target, {**where, "device": device}, prover, wanted, workers)
            try:
                in_processes(task, workers, advance)
            finally:
                known = stored.gather()
        else:
            known = stored.extend(found.model, missing, known, advance)
    if known is None:
        raise TrivetError(f"{found.test.name} has no points to certify.")
    return stored.file_of(known.first(wanted))


def _certify_shard(
    target: str | Path | nn.Module,
    where: dict[str, Any],
    prover: Certifier,
    wanted: int,
    workers: int,
    number: int,
    advance: display.Advance,
) -> None:
    """One worker's share: every `workers`-th of the points that were missing when it was started."""
    found = Target.open(target, **where)
    stored = _stored(found, prover)
    known = stored.read()
    stored.extend(found.model, stored.missing(known, wanted)[number::workers], known, advance, stored.shard(number))


def _stored(found: Target, certifier: Certifier) -> Stored:
    return Stored(found.folder.certificates, certifier, found.seed, fingerprint(found.model), found.test)


def epsilon_of(run: str | Path) -> list[dict[str, Any]]:
    """A private run's account, computed again from the steps its stages spent; one row, none if it was not private.

    Raises:
        TrivetError: the run has not finished, or was not private, with the reason.
    """
    history = Run.open(run).history
    if not history:
        raise TrivetError(f"{run} has not finished; `trivet train {run} --resume` goes on with it.")
    stages = [each["privacy"] for each in history if "privacy" in each]
    if not stages:
        raise TrivetError(f"{run} was not trained privately; a fit stage is with rule: {{name: dp_sgd, ...}}.")
    for stage in stages:
        if stage["standing"] != "private":
            raise TrivetError(f"{run} has no epsilon; it is {stage['standing']}.")
    delta = stages[-1]["delta"]
    found = account([(Event(**stage["event"]), stage["steps"]) for stage in stages], delta)
    return [
        {
            "run": str(run),
            "epsilon": rounded_up(found.epsilon),
            "delta": delta,
            "at least": f"{found.lower:.4g}",
            "by Renyi": f"{found.rdp:.4g}",
            "steps": sum(stage["steps"] for stage in stages),
            "noise multiplier": " ".join(f"{stage['event']['noise_multiplier']:.4g}" for stage in stages),
            "accountant": found.accountant,
        }
    ]


def budgets() -> list[dict[str, Any]]:
    """What every data set has been spent on: one row each, with the epsilon of all its runs together.

    It is stated at the largest power of ten at or under a tenth of one over the records; an upper bound.
    """
    rows = []
    for data, spent in grouped(spendings()).items():
        delta = customary_delta(spent[0].records)
        rows.append(
            {
                "data": spent[0].name,
                "records": spent[0].records,
                "digest": data[:16],
                "runs": len({each.run for each in spent}),
                "epsilon": rounded_up(in_all(spent, delta)),
                "delta": delta,
            }
        )
    return rows


def compare_runs(runs: Sequence[str | Path], *, trust_code: bool = False) -> list[Subject]:
    """The audited runs, side by side: what `trivet.audit.report.comparison` tabulates and `write_report` draws."""
    return [Run.open(run, trust_code=trust_code).subject() for run in runs]


def write_report(runs: Sequence[str | Path], out: str | Path | None = None, *, trust_code: bool = False) -> Path:
    """One self-contained HTML page about one or more audited runs; the path it was written to.

    Args:
        runs: run folders, audited before.
        out: the file; report.html in the folder of a single run, ./report.html for several, if None.
    """
    if len(runs) == 1 and is_policy(runs[0]):
        page = render_policy(Run.open(runs[0]).policy_subject())
    else:
        page = render(compare_runs(runs, trust_code=trust_code))
    path = Path(out) if out else RunFolder(Path(runs[0])).report if len(runs) == 1 else Path("report.html")
    if not path.parent.is_dir():
        raise TrivetError(f"{path.parent} is not a folder; make it or choose another --out.")
    write_text(path, page)
    return path


def run_demo(out: str | Path = "runs/demo") -> tuple[list[Subject], Path]:
    """Train small networks on the embedded digits in four ways, audit each, and report on all: a few minutes."""
    runs = []
    for name in ("digits-plain", "digits-pgd-at", "digits-dp-pgd-at", "digits-hydra-dp-ibp"):
        run = train_model(name, out=Path(out) / name, resume=True)  # an earlier demo's runs are taken as they are
        audit_model(run.folder.path)
        runs.append(run.folder.path)
    return compare_runs(runs), write_report(runs, Path(out) / "report.html")
