"""BatchNorm held at the statistics of one batch, so that several passes of a training step see the same network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trivet.models.modes import evaluating


def training_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that would normalise by the batch they are given."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]


@contextmanager
def held_at(model: nn.Module, x: Tensor, *, update: bool = True) -> Iterator[Tensor]:
    """Pass `x` [B, ...] through `model` in its present mode; inside, eval mode with BatchNorm as in that pass.

    Yields the logits [B, K]. BatchNorm layers in training mode normalise by mean and (biased) variance of `x` inside
    the context, whatever they are given there; gradients flow through both. Layers that were frozen stay so, dropout
    is off. Outside, modes and running statistics are as after the one pass: moved once, as always, or not at all
    without `update`.
    """
    norms = training_norms(model)
    found: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].float() if inputs[0].dtype in (torch.float16, torch.bfloat16) else inputs[0]
        axes = [axis for axis in range(values.ndim) if axis != 1]
        found[norm] = (values.mean(axes), values.var(axes, correction=0))  # type: ignore[index]

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    before = {norm: dict(norm._buffers) for norm in norms}
    kept = {} if update else {norm: _copies(norm) for norm in norms}
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, values in kept.items():
            for name, value in values.items():
                norm.get_buffer(name).copy_(value)
    try:
        for norm, (mean, variance) in found.items():
            # Set past the module's checks: these are results of the pass, not leaves.
            norm._buffers["running_mean"], norm._buffers["running_var"] = mean, variance
            if mean.requires_grad:  # PyTorch's own function lets no gradient through running statistics
                norm.forward = partial(_normalised, norm, mean, variance)  # type: ignore[method-assign]
        with evaluating(model):
            yield logits
    finally:
        for norm, buffers in before.items():
            norm._buffers.update(buffers)
            norm.__dict__.pop("forward", None)


def _normalised(norm: _BatchNorm, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """What `norm` does in eval mode with these running statistics, differentiable in them."""
    factor = (variance + norm.eps).rsqrt()
    axes = (-1, *[1] * (x.ndim - 2))
    y = (x - mean.view(axes)) * factor.view(axes)
    return y if norm.weight is None else y * norm.weight.view(axes) + norm.bias.view(axes)


def _copies(norm: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm._buffers.items() if value is not None}
