"""The stage that cuts idle channels out of a network, for good."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trivet.claims import Effect, Verdict
from trivet.compression.compression import steps_on
from trivet.compression.masks import Mask, Masks
from trivet.compression.shrink import shrunk
from trivet.compression.structure import finish
from trivet.errors import TrivetError
from trivet.methods import method, spec_of
from trivet.models.modes import evaluating
from trivet.randomness import derive_seed, generator
from trivet.training.stage import Checkpoint, Context, Stage

_TOLERANCE = 1e-5
"""Of the largest logit, where that is above 1: what folding a constant into a bias may change by rounding."""
_PROBES = 64


@method(title="Physical shrinking", legs="small")
@dataclass(frozen=True)
class Shrink(Stage):
    """Cut out every channel that carries nothing: pruned filters, unread inputs, whole groups across residual sums.

    A channel goes only where the function stays: where all that read it multiply it by zero, or find it constantly
    zero, or constant and their bias can take it over exactly. A pruned filter before BatchNorm is constant, and goes
    where activation makes it zero; at a positive constant before a padded convolution it stays. Group normalisation
    keeps a group whole. Both networks are compared on random inputs, and a difference above 1e-5 is an error.

    Compressed weights become plain ones here. Layers that carried masks are masked again, so that later stages keep
    their zeros. Reads weights alone.
    """

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "channels were cut out; the function is the same, but for rounding")
        kept = (Verdict.KEEP, "the channels were chosen by looking at weights alone")
        return Effect(privacy=kept, certificate=changed, attack=changed, accuracy=changed, cost=changed)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model = checkpoint.model.to(context.device)
        shape = context.splits.train.input_shape
        masked = [
            name
            for name, layer in model.named_modules()
            if any(isinstance(step, Mask) and not _factored(layer) for step in steps_on(layer))
        ]
        structure = finish(model, checkpoint.structure)
        before = copy.deepcopy(model)
        made = shrunk(model, shape)
        probes = torch.rand(_PROBES, *shape, generator=generator(context.seed, "shrink", context.files.number))
        difference = _difference(before, model, probes.to(context.device), context.seed)
        if not difference <= _TOLERANCE:
            raise TrivetError(
                f"{context.files.name} changed the logits by {difference:.3g}, so the model computes something that "
                "its layers do not show; leave the stage out."
            )
        if made.keep:
            structure = [*structure, spec_of(made)]
        if masked:
            masks = Masks(include=tuple(masked))
            masks.attach(model)
            masks.initialise(model)
            structure = [*structure, spec_of(masks)]
        record = {
            "stage": "shrink",
            "parameters": [sum(each.numel() for each in net.parameters()) for net in (before, model)],
            "cut": {name: {side: len(left) for side, left in kept.items()} for name, kept in made.keep.items()},
            "difference": difference,
        }
        model.eval()
        return replace(checkpoint, model=model, history=[*checkpoint.history, record], structure=structure)


def _factored(layer: nn.Module) -> bool:
    return any(getattr(step, "factors", False) for step in steps_on(layer))


@torch.no_grad()
def _difference(before: nn.Module, after: nn.Module, inputs: Tensor, seed: int) -> float:
    """The largest difference of logits, as a share of the largest logit where that is above 1; same random draws."""
    logits = []
    for net in (before, after):
        with evaluating(net), torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "layers"))
            logits.append(net(inputs))
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1.0))
