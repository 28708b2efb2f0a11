"""Structured pruning by dependency graph, done by the library Torch-Pruning: a peer for our own pruning and cutting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trivet.claims import Effect, Verdict
from trivet.compression.shrink import Shrink
from trivet.compression.structure import finish
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.training.stage import Checkpoint, Context, Stage


@method(
    title="DepGraph",
    paper="Fang et al., CVPR 2023",
    year=2023,
    legs="small",
    note="done by the library Torch-Pruning",
)
@dataclass(frozen=True)
class DepGraph(Stage):
    """Remove the share `ratio` of the channels of every group of tied layers, those of least group magnitude.

    Pruning and cutting in one, with another function than before: fine-tune afterwards. The library finds the groups
    and cuts; we keep what it left. Reads weights alone.

    Attributes:
        ratio: of channels to remove, the same in every layer.
        exclude: shell patterns over the names of layers whose outputs stay; name the one that gives the logits.
    """

    ratio: float = 0.5
    exclude: tuple[str, ...] = ("logits",)

    def __post_init__(self) -> None:
        require(0 < self.ratio < 1, f"ratio={self.ratio} must lie strictly between 0 and 1.")

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "channels were removed")
        kept = (Verdict.KEEP, "the channels were chosen by looking at weights alone")
        return Effect(privacy=kept, certificate=changed, attack=changed, accuracy=changed, cost=changed)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        try:
            import torch_pruning  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise TrivetError("dep_graph needs Torch-Pruning; pip install torch-pruning.") from None
        model = checkpoint.model.to(context.device).eval()
        if any(isinstance(each, nn.GroupNorm) for each in model.modules()):
            raise TrivetError(
                f"{context.files.name} would leave groups of other sizes in GroupNorm; use prune and shrink."
            )
        structure = finish(model, checkpoint.structure)
        example = torch.zeros(1, *context.splits.train.input_shape, device=context.device)
        before = _widths(model)
        ignored = [m for name, m in model.named_modules() if any(fnmatchcase(name, each) for each in self.exclude)]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.BasePruner(
            model, example, importance=importance, pruning_ratio=self.ratio, ignored_layers=ignored
        ).step()
        after = _widths(model)
        # To build it again only the widths matter: the weights that are read then are those that were left.
        keep = {
            name: {side: tuple(range(width)) for side, width in after[name].items() if width != before[name][side]}
            for name in after
            if after[name] != before[name]
        }
        if keep:
            structure = [*structure, spec_of(Shrink(keep=keep))]
        record = {
            "stage": "dep_graph",
            "settings": spec_of(self),
            "parameters": sum(map(torch.numel, model.parameters())),
        }
        return replace(checkpoint, model=model, history=[*checkpoint.history, record], structure=structure)


def _widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """The numbers of channels of every layer that has some; `outputs` alone where a layer treats each by itself."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, nn.Linear):
            found[name] = {"outputs": layer.out_features, "inputs": layer.in_features}
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found[name] = {"outputs": layer.out_channels} | ({"inputs": layer.in_channels} if layer.groups == 1 else {})
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            found[name] = {"outputs": layer.num_features}
    return found
