"""Trivet trains neural networks that are robust, private and small at once, and proves or measures every claim.

    import trivet

    run = trivet.train_model("digits-pgd-at")
    subject = trivet.audit_model(run.folder.path)

The names below are the whole surface for users; whoever extends Trivet imports the protocols from their rooms
(`trivet.objectives.objective`, `trivet.threats.attack`, …). Each is imported on first use, so that `import trivet`
is instant and PyTorch is loaded only by what needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivet.api import audit_model as audit_model
    from trivet.api import certify_model as certify_model
    from trivet.api import compare_runs as compare_runs
    from trivet.api import run_demo as run_demo
    from trivet.api import train_model as train_model
    from trivet.api import write_report as write_report
    from trivet.errors import TrivetError as TrivetError
    from trivet.methods import build as build
    from trivet.methods import methods as list_methods  # noqa: F401
    from trivet.recipes.recipe import load as load_recipe  # noqa: F401
    from trivet.recipes.recipe import shipped as list_recipes  # noqa: F401
    from trivet.runs import Run as Run

_HOMES = {
    "Run": "trivet.runs:Run",
    "TrivetError": "trivet.errors:TrivetError",
    "audit_model": "trivet.api:audit_model",
    "build": "trivet.methods:build",
    "certify_model": "trivet.api:certify_model",
    "compare_runs": "trivet.api:compare_runs",
    "list_methods": "trivet.methods:methods",
    "list_recipes": "trivet.recipes.recipe:shipped",
    "load_recipe": "trivet.recipes.recipe:load",
    "run_demo": "trivet.api:run_demo",
    "train_model": "trivet.api:train_model",
    "write_report": "trivet.api:write_report",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trivet' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(_HOMES)
