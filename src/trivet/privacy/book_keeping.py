"""The engine that clips per record in one backward pass, by the books kept of each layer's inputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.privacy.engine import (
    ClippedSum,
    Engine,
    Factors,
    Found,
    Losses,
    Unsuited,
    coupling,
    keep_finite,
    parameters_of,
    wide,
)
from trivet.privacy.layers import EmbeddingTape, NormTape, Session, Tape
from trivet.privacy.matrix_layers import ConvolutionTape, LinearTape

RULES: dict[type[nn.Module], type[Tape]] = {
    nn.Linear: LinearTape,
    nn.Conv1d: ConvolutionTape,
    nn.Conv2d: ConvolutionTape,
    nn.Embedding: EmbeddingTape,
    nn.GroupNorm: NormTape,
    nn.LayerNorm: NormTape,
    nn.InstanceNorm1d: NormTape,
    nn.InstanceNorm2d: NormTape,
    nn.InstanceNorm3d: NormTape,
}
"""The rule of each layer. Subclasses are not meant: their forward pass may be another."""

_LEAST = 32  # records at once: fewer leave the processor idle between layers


@dataclass(frozen=True)
class BookKeeping(Engine):
    """One forward pass, one backward pass without weight gradients, then one weighted sum (Bu et al. 2022).

    Each layer with trainable parameters is recorded by a tape (`layers.Tape`): inputs and output gradients of all
    its calls, summed over the calls and views of a record before the norm is taken. Per layer and shape the tape
    takes the cheaper of norms without gradients (ghost norms) and gradients computed at once.

    Exact for the layers in `RULES`, parametrized or not, as long as every use of a trainable parameter is a call of
    its layer; a gradient that reaches a parameter in another way is found and is an error. Ghost norms are sums of
    products in float32, good to about 1e-6 of the sum of their magnitudes.

    Attributes:
        records: held in memory at once at most.
        budget: bytes that gradients of single records may take, beyond which fewer are held; 32 always are.
    """

    records: int = 256
    budget: int = 2**28

    def __post_init__(self) -> None:
        require(self.records >= 1, f"records={self.records} must be at least 1.")
        require(self.budget >= 1, f"budget={self.budget} must be at least 1.")

    def at_once(self, model: nn.Module) -> int:
        # An upper estimate: whether a convolution's are held at all depends on the size of its output.
        row = sum(
            p.numel() * p.element_size()
            for layer in _layers(model)
            if type(layer) not in (nn.Linear, nn.Embedding)
            for p in layer.parameters()
            if p.requires_grad
        )
        return min(self.records, max(_LEAST, self.budget // max(row, 1)))

    def refusal(self, model: nn.Module) -> str | None:
        coupled = coupling(model)
        if coupled is not None:
            return coupled
        inner = _parametrizations(model)
        owners: dict[nn.Parameter, str] = {}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad:
                    continue
                path = f"{name}.{key}" if name else key
                if parameter in owners:
                    return (
                        f"{owners[parameter]} and {path} are one tied parameter, which book-keeping cannot clip as "
                        "one; choose engine='materialised'."
                    )
                owners[parameter] = path
                reason = None if module in inner else _unknown(module, key)
                if reason is not None:
                    return f"{path}: {reason}; choose engine='materialised'."
            if parametrize.is_parametrized(module) and any(p.requires_grad for p in module.parameters()):
                for key in module.parametrizations:
                    reason = _unknown(module, key)
                    if reason is not None:
                        return f"{name}.{key}: {reason}; choose engine='materialised'."
        return None

    def part(self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors) -> ClippedSum:
        parameters = parameters_of(model)
        session = Session(len(batch), perturbed.device)
        tapes = [RULES[_kind(layer)](layer, session) for layer in _layers(model)]
        with _recording(tapes):
            found = losses(model, batch, perturbed)
            per_example = found.per_example
            require(
                per_example.shape == (len(batch),),
                f"the losses of {len(batch)} records have shape {list(per_example.shape)}; give one for each.",
            )
            if per_example.requires_grad:
                session.collecting = True
                # Weights are cut off from autograd inside tapes: a gradient that arrives took another way.
                _, *beside = torch.autograd.grad(
                    per_example.sum(), [session.anchor, *parameters], allow_unused=True, materialize_grads=False
                )
                _expect_none(model, parameters, beside)
        with torch.no_grad():
            norms = torch.zeros(len(batch), device=per_example.device, dtype=wide(per_example.dtype))
            for square in (square for tape in tapes for square in tape.squares()):
                norms += square
            norms = norms.clamp_min(0.0).sqrt()
            scale, lost = keep_finite(norms, factors)
            if lost is not None:
                for tape in tapes:
                    tape.discard(lost)
            total: dict[nn.Parameter, Tensor] = {}
            for parameter, piece in (pair for tape in tapes for pair in tape.total(scale)):
                total[parameter] = total[parameter] + piece if parameter in total else piece
        return ClippedSum(
            [total[p] if p in total else torch.zeros_like(p, dtype=wide(p.dtype)) for p in parameters],
            norms,
            Found(per_example.detach(), {name: value.detach() for name, value in found.log.items()}),
        )


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was parametrized."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return kind


def _unknown(module: nn.Module, tensor: str) -> str | None:
    """Why no rule covers `tensor` of `module`; None if one does."""
    kind = _kind(module)
    if kind not in RULES or "forward" in module.__dict__:
        return f"no rule is known for the per-record gradient of {kind.__name__}"
    if tensor not in RULES[kind].tensors:
        return f"{kind.__name__} has no {tensor!r} of its own making"
    reason = RULES[kind].refusal(module)
    return None if reason is None else f"{kind.__name__} {reason}"


def _parametrizations(model: nn.Module) -> set[nn.Module]:
    """The modules that compute the parametrized tensors of other modules."""
    return {
        inner
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for inner in module.parametrizations.modules()  # type: ignore[union-attr]
    }


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules with trainable parameters, those of their parametrizations included."""
    inner = _parametrizations(model)
    return [
        module
        for module in model.modules()
        if module not in inner
        and (
            any(p is not None and p.requires_grad for p in module._parameters.values())
            or (
                parametrize.is_parametrized(module)
                and any(p.requires_grad for p in module.parametrizations.parameters())  # type: ignore[union-attr]
            )
        )
    ]


@contextmanager
def _recording(tapes: Sequence[Tape]) -> Iterator[None]:
    """The forward passes of the layers go to their tapes inside."""
    try:
        for tape in tapes:
            tape.module.forward = tape.forward
        yield
    finally:
        for tape in tapes:
            tape.module.__dict__.pop("forward", None)


def _expect_none(model: nn.Module, parameters: Sequence[nn.Parameter], beside: Sequence[Tensor | None]) -> None:
    used = [p for p, gradient in zip(parameters, beside, strict=True) if gradient is not None]
    if used:
        name = next(name for name, p in model.named_parameters() if p is used[0])
        raise Unsuited(f"{name} is used outside of its layer's own call; choose engine='materialised'.")
