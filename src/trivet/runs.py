"""What the verbs work on: the folder of a run, and the model, data and settings that an audit is about."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivet.audit.findings import Findings
from trivet.audit.policy_findings import PolicyFindings
from trivet.audit.policy_report import PolicySubject
from trivet.audit.subject import Subject
from trivet.claims import Ledger
from trivet.control.environment import Environment
from trivet.data.dataset import Dataset
from trivet.errors import TrivetError
from trivet.files import load_tensors
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.quantized import Quantize
from trivet.models.foreign.twinned import Twinned
from trivet.recipes.plan import Plan, plan
from trivet.recipes.recipe import Source, load, shipped
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into


@dataclass(frozen=True)
class Run:
    """A run folder, read on demand."""

    folder: RunFolder
    source: Source

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        data: str | None = None,
        trust_code: bool = False,
    ) -> Run:
        """An existing run. Code that its recipe names by import path runs only with `trust_code`, when it is needed."""
        folder = RunFolder.open(Path(path))
        return cls(folder, load(folder.path, overrides, data=data, trust=trust_code))

    @cached_property
    def plan(self) -> Plan:
        """The recipe's methods, built."""
        return plan(self.source)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def claims(self) -> Ledger:
        """The ledger; empty before training has finished."""
        return Ledger.load(self.folder.claims) if self.folder.claims.exists() else Ledger()

    @property
    def findings(self) -> Findings:
        """What the last audit found."""
        self._require_audit()
        if self.is_policy:
            raise TrivetError(f"{self.folder.path} is a policy, and cannot be set beside models that label records.")
        return Findings.load(self.folder.audit)

    @property
    def is_policy(self) -> bool:
        """Whether it learnt in an environment."""
        return self.source.recipe.environment is not None

    def _require_audit(self) -> None:
        if not self.folder.audit.exists():
            raise TrivetError(f"{self.folder.path} has not been audited; run `trivet audit {self.folder.path}`.")

    @property
    def history(self) -> list[dict[str, Any]]:
        """What each finished stage recorded; empty before training has finished."""
        weights = self.folder.weights
        return load_tensors(weights)[1]["history"] if weights.exists() else []

    def model(self, like: Dataset | Environment) -> nn.Module:
        """The trained model in eval mode; `like` tells input shape and classes."""
        if not self.folder.weights.exists():
            raise TrivetError(
                f"{self.folder.path} has no weights yet; finish it with `trivet train {self.folder.path} --resume`."
            )
        model = self.plan.model(like)
        load_into(model, self.folder.weights)
        return model.eval()

    def subject(self) -> Subject:
        """Everything a report shows of this run."""
        examples = self.folder.examples
        return Subject(
            name=self.name,
            recipe=self.source.recipe.model_dump(exclude_defaults=True),
            run=self.folder.status,
            log=self.folder.read_log(),
            findings=self.findings,
            claims=self.claims.claims,
            examples=load_tensors(examples)[0] if examples.exists() else {},
            history=self.history,
        )

    def policy_subject(self) -> PolicySubject:
        """Everything a report shows of this run, if it is a policy."""
        self._require_audit()
        return PolicySubject(
            PolicyFindings.load(self.folder.audit),
            self.claims.claims,
            self.source.recipe.model_dump(exclude_defaults=True),
            self.folder.status,
            self.folder.read_log(),
        )


@dataclass(frozen=True)
class Target:
    """What an audit and a certifier look at: a model, the test data, the settings to judge it by, and where to write.

    `source` says where the model came from, `again` is the command that audits it once more, and `is_run` whether it
    came with the recipe it was trained by.
    """

    name: str
    model: nn.Module
    test: Dataset
    plan: Plan
    folder: RunFolder
    source: str
    again: str
    is_run: bool

    @classmethod
    def open(
        cls,
        target: str | Path | nn.Module,
        *,
        recipe: str | Path | None,
        data: str | None,
        overrides: Sequence[str],
        out: str | Path | None,
        trust_code: bool,
        device: str,
    ) -> Target:
        """A run folder, a .pt2, .onnx or .safetensors file, or a module in memory."""
        where = torch_device(device)
        in_memory = isinstance(target, nn.Module)
        name = type(target).__name__ if in_memory else Path(str(target)).name
        options = [("--recipe", recipe), ("--data", data), *(("--set", each) for each in overrides), ("--out", out)]
        source = name if in_memory else str(target)
        again = ["trivet", "audit", f"<{name}>" if in_memory else source]
        again += [str(part) for option in options if option[1] is not None for part in option]
        is_run = not in_memory and Path(str(target)).is_dir()
        if is_run:
            if recipe is not None:
                raise TrivetError(f"{target} is a run folder and has its own recipe; leave out --recipe, use --set.")
            run = Run.open(str(target), overrides=overrides, data=data, trust_code=trust_code)
            settings, test = run.plan, run.plan.splits().test
            model = run.model(test)
            folder = run.folder if out is None else beside(audit_folder(source, out), settings)
        else:
            exported = None if in_memory else _exported(source)
            _require_model(target, recipe or exported)
            # Leak tests are about the training, which an exported file has behind it: its run's audit tells of them.
            own = ["audit.leaks=[]"] if exported and recipe is None else []
            settings = plan(load(recipe or exported or "audit", [*own, *overrides], data=data, trust=trust_code))
            test = settings.splits().test
            model = target if isinstance(target, nn.Module) else _read(Path(target), settings, test)
            folder = beside(audit_folder(source, out or (f"{name}.audit" if in_memory else None)), settings)
        return cls(name, model.to(where), test, settings, folder, source, shlex.join(again), is_run)

    @property
    def seed(self) -> int:
        return self.plan.recipe.seed


def audit_folder(source: str, out: str | Path | None) -> Path:
    """Where an audit of `source` writes: `out`, a run's own folder, or FILE.audit beside a model file."""
    if out is not None:
        return Path(out)
    return Path(source) if Path(source).is_dir() else Path(f"{source}.audit")


def _require_model(target: str | Path | nn.Module, recipe: str | Path | None) -> None:
    """Refuse what is no model before any data are read."""
    if isinstance(target, nn.Module):
        return
    if not Path(target).is_file():
        mend = f"train it first: trivet train {target}" if str(target) in shipped() else "check the path"
        raise TrivetError(f"there is no run folder or model file {target}; {mend}.")
    if Path(target).suffix == ".safetensors" and recipe is None:
        raise TrivetError(f"{target} holds weights only; name the recipe of its model with --recipe.")


def _read(path: Path, settings: Plan, test: Dataset) -> nn.Module:
    """The model in a file; weights alone are those of the recipe's model.

    A quantised network answers in the runtime it is made for, whose integers fall on other sides of some edges.
    """
    if path.suffix != ".safetensors":
        model = load_model(path)
        quantized = any(isinstance(each, Quantize) for each in model.modules())
        if not quantized:
            return model
        runtime = ExportedModel(path) if path.suffix == ".pt2" else OnnxRuntimeModel(path)
        return Twinned(model, runtime, runtime.conditions).eval()
    model = settings.model(test)
    load_into(model, path)
    return model.eval()


EXPORTED = "exported.json"
"""Lies in FILE.audit where FILE was exported from a run, with the run's recipe beside it."""
_BESIDE = "audit only"


def _exported(source: str) -> Path | None:
    """Where the recipe lies by which an exported file is to be judged."""
    folder = audit_folder(source, None)
    return folder if (folder / EXPORTED).exists() else None


def beside(out: Path, settings: Plan) -> RunFolder:
    """A folder for what is found about a model that is not ours: a run folder without training."""
    if (out / "recipe.yaml").exists():
        folder = RunFolder.open(out)
        if folder.status["status"] != _BESIDE:
            raise TrivetError(f"{out} is the folder of a training run; choose another --out.")
        return folder
    folder = RunFolder.create(out, settings.source.dump())
    folder.record(_BESIDE, settings.recipe.seed)
    return folder


def torch_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise TrivetError(f"there is no device {name!r} here; use --device cpu.") from None
    return device
