"""The stage that spoils a ticket on purpose: what survives it owes nothing to which weights were chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from trivet.claims import Effect, Verdict
from trivet.compression.compression import originals, steps_on
from trivet.compression.masks import Mask
from trivet.errors import TrivetError
from trivet.methods import method, spec_of
from trivet.randomness import generator
from trivet.training.stage import Checkpoint, Context, Stage


@method(
    title="Sanity checks of tickets",
    paper="Su et al., NeurIPS 2020; Frankle et al., ICLR 2021",
    year=2020,
    legs="small",
)
@dataclass(frozen=True)
class SanityCheck(Stage):
    """Shuffle a pruned network layer by layer; the number of weights each layer keeps stays.

    A mask that trains as well when it is shuffled owes what it reaches to the densities of the layers, and one that
    does with its weights shuffled among the kept places owes nothing to their values. Run the stages after it in both
    ways and compare. The values of the layer are those it had, so that scales do not change.

    Attributes:
        shuffle: "masks" moves kept weights, with their values, to random places of their layer; "weights" leaves the
            places and exchanges the values among them.
    """

    shuffle: Literal["masks", "weights"] = "masks"

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "the weights were shuffled")
        kept = (Verdict.KEEP, "the shuffle is random and sees no record")
        same = (Verdict.KEEP, "each layer keeps as many weights")
        return Effect(privacy=kept, certificate=changed, attack=changed, accuracy=changed, cost=same)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model = checkpoint.model
        found = {name: layer for name, layer in model.named_modules() if _masks(layer)}
        if not found:
            raise TrivetError(f"{context.files.name} shuffles masks, and there are none; put awt or prune before it.")
        with torch.no_grad():
            for name, layer in found.items():
                if len(steps_on(layer)) > 1 or not isinstance(steps_on(layer)[0], Mask):
                    raise TrivetError(
                        f"{context.files.name} shuffles layers with one mask and nothing else on them, and {name} has "
                        "more; prune once before it."
                    )
                (stored,), mask = originals(layer), _masks(layer)[0].mask
                draw = generator(context.seed, "sanity", context.files.number, name)
                flat, kept = stored.reshape(-1).clone(), mask.reshape(-1).clone()
                places = torch.arange(len(flat)) if self.shuffle == "masks" else kept.cpu().nonzero().squeeze(1)
                order = places[torch.randperm(len(places), generator=draw)].to(flat.device)
                places = places.to(flat.device)
                moved = flat.clone()
                moved[places] = flat[order]
                stored.copy_(moved.view_as(stored))
                if self.shuffle == "masks":
                    mask.copy_(kept[order].view_as(mask))
        record: dict[str, Any] = {"stage": "sanity_check", "settings": spec_of(self), "layers": list(found)}
        return replace(checkpoint, history=[*checkpoint.history, record])


def _masks(layer: torch.nn.Module) -> list[Mask]:
    return [step for step in steps_on(layer) if isinstance(step, Mask)]
