"""Rounding of trained weights to evenly spaced levels, done by the library torchao: a peer for our own quantizers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils import parametrize

from trivet.claims import Effect, Verdict
from trivet.compression.masks import Masks
from trivet.compression.structure import finish
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.models.foreign.quiet import quiet
from trivet.training.stage import Checkpoint, Context, Stage


@method(
    title="Round to nearest",
    paper="Jacob et al., CVPR 2018",
    year=2018,
    legs="small",
    note="done by the library torchao; weights alone, after training",
)
@dataclass(frozen=True)
class RoundToNearest(Stage):
    """w -> s * clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1),   s = max |w| / (2^(bits-1) - 1/2), for each layer.

    What any quantizer that trains has to beat. The weights stay ordinary tensors, on few values: a packed file stores
    `bits` bits of each. Hence one step for a layer, and not one for each channel: kernels of many steps have too many
    values to pack. Zeros stay zeros. Masks and levels of earlier stages become plain weights, so do not train on.
    Reads weights alone. Activations stay in float32: `trivet export --int8` rounds those too.

    Attributes:
        bits: of a weight, 2 to 8.
        include, exclude: shell patterns over the names of layers.
    """

    bits: int = 8
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"bits={self.bits} must be from 2 to 8.")

    def effect(self) -> Effect:
        changed = (Verdict.VOID, "the weights were rounded")
        kept = (Verdict.KEEP, "the weights were rounded by looking at weights alone")
        return Effect(privacy=kept, certificate=changed, attack=changed, accuracy=changed, cost=changed)

    @torch.no_grad()
    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        try:
            with quiet():
                from torchao.quantization import quant_primitives as torchao
        except ImportError:
            raise TrivetError("round_to_nearest needs torchao; pip install 'trivet[pt2]'.") from None
        model = checkpoint.model.to(context.device).eval()
        structure = finish(model, checkpoint.structure)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        errors = {}
        for name, layer in Masks(include=self.include, exclude=self.exclude).layers(model).items():
            if parametrize.is_parametrized(layer, "weight"):
                raise TrivetError(f"{context.files.name} cannot round {name}, which is stored as factors; exclude it.")
            weight: Any = layer.weight
            block = tuple(weight.shape)  # one step for all
            step, zero = torchao.choose_qparams_affine(
                weight, torchao.MappingType.SYMMETRIC, block, torch.int8, low, high
            )
            levels = torchao.quantize_affine(weight, block, step, zero, torch.int8, low, high)
            rounded = torchao.dequantize_affine(levels, block, step, zero, torch.int8, low, high)
            size = weight.norm()
            errors[name] = float((rounded - weight).norm() / size) if size > 0 else 0.0
            weight.copy_(rounded)
        record = {"stage": "round_to_nearest", "settings": spec_of(self), "relative_error": errors}
        return replace(checkpoint, model=model, history=[*checkpoint.history, record], structure=structure)
