"""From a recipe to the objects it describes: threat, stages and audit at once, data and model when they are needed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivet import methods
from trivet.audit.audit import Audit
from trivet.audit.policy_audit import PolicyAudit
from trivet.control.environment import Environment
from trivet.data.dataset import Dataset, Splits
from trivet.errors import FieldError, TrivetError
from trivet.randomness import derive_seed
from trivet.recipes.recipe import Recipe, Source
from trivet.threats.threat import ThreatModel
from trivet.training.stage import Stage


@dataclass(frozen=True)
class Plan:
    """A recipe whose every method has been built and checked, before any data is read or any step taken.

    `environment` and `policy_audit` belong to recipes for policies, whose `audit` is not used; others have none.
    """

    source: Source
    threat: ThreatModel
    stages: tuple[tuple[str, Stage], ...]
    audit: Audit
    environment: Environment | None = None
    policy_audit: PolicyAudit | None = None

    @property
    def recipe(self) -> Recipe:
        return self.source.recipe

    def splits(self) -> Splits:
        """Read the data, cut to `train_limit` and `test_limit`."""
        if self.environment is not None:
            raise TrivetError(f"{self.source.where} is for a policy in an environment, and there are no records in it.")
        if self.recipe.data is None:
            raise TrivetError(f"{self.source.where} names no data; say which with --data.")
        settings = dict(self.recipe.data)
        limits = {part: settings.pop(f"{part}_limit", None) for part in ("train", "test")}
        splits: Splits = _build(self.source, ("data",), "data", settings, expects=Splits)
        return splits.limited(**limits)

    def model(self, data: Dataset | Environment, seed: int | None = None) -> nn.Module:
        """The recipe's model for inputs and classes (or observations and actions) like those of `data`, freshly made.

        By the recipe's seed, or by another one.
        """
        if self.recipe.model is None:
            raise TrivetError(f"{self.source.where} describes no model; it is for auditing models trained elsewhere.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.recipe.seed if seed is None else seed, "init"))
            model: nn.Module = _build(
                self.source,
                ("model",),
                "models",
                self.recipe.model,
                expects=nn.Module,
                input_shape=data.input_shape,
                num_classes=data.num_classes,
            )
        return model


def plan(source: Source) -> Plan:
    """Build everything a recipe names except data and model.

    Raises:
        TrivetError: with file, line and field; also where the recipe names code by import path and is not trusted.
    """
    recipe = source.recipe
    _admit(source)
    threat = _build(source, ("threat",), "threats", recipe.threat, expects=ThreatModel)
    _require_one_source(source)
    environment, context = None, {"threat": threat}
    if recipe.environment is not None:
        environment = _build(source, ("environment",), "control", recipe.environment, expects=Environment)
        context["environment"] = environment
    stages = []
    for number, entry in enumerate(recipe.stages):
        if len(entry) != 1:
            text = f"must be one stage with its settings, e.g. `fit: {{...}}`; got {', '.join(entry) or 'nothing'}."
            raise source.located(FieldError(("stages", number), text))
        ((name, settings),) = entry.items()
        path = ("stages", number, name)
        stage = _build(source, path, "training", {"name": name, **settings}, expects=Stage, **context)
        stages.append((name, stage))
    if environment is None:
        audit = _build(source, ("audit",), "audit", {"name": "audit", **recipe.audit}, **context)
        return Plan(source, threat, tuple(stages), audit)
    policy_audit = _build(source, ("audit",), "audit", {"name": "policy_audit", **recipe.audit}, **context)
    return Plan(source, threat, tuple(stages), Audit(threat), environment, policy_audit)


def _require_one_source(source: Source) -> None:
    if source.recipe.environment is not None and source.recipe.data is not None:
        text = "a recipe learns from data or from an environment; leave one of them out."
        raise source.located(FieldError(("environment",), text))


def _admit(source: Source) -> None:
    """Say aloud which of the user's code will run, or refuse."""
    imports = source.imports()
    if imports and not source.trusted:
        raise TrivetError(
            f"{source.where} names code to import ({', '.join(imports)}) and lies in a run folder, which may be "
            "somebody else's; read that code, then add --trust-code."
        )
    for path in imports:
        print(f"importing {path}, named by {source.where}", file=sys.stderr)
    if imports:
        for folder in (str(Path(source.where).resolve().parent), str(Path.cwd())):
            if folder not in sys.path:
                sys.path.insert(0, folder)


def _build(source: Source, path: tuple[str | int, ...], room: str, spec: Mapping[str, Any], **context: Any) -> Any:
    try:
        return methods.build(room, spec, **context)
    except FieldError as error:
        raise source.located(FieldError((*path, *error.path), error.text)) from None
