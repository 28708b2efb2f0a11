"""What a model's outputs and input gradients look like from outside: can attacks that follow them work at all?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trivet.models.surrogate import Logits
from trivet.threats.attack import input_gradient
from trivet.threats.losses import AttackLoss, cross_entropy, dlr, margin

_NO_GRADIENT = (
    "does not require grad",
    "appears to not have been used in the graph",
    "on Tensor that requires grad",
    "is not implemented",
)
"""How PyTorch words that an operation, or a model run by another engine, cannot be differentiated."""


def lacks_gradient(error: RuntimeError) -> bool:
    """Whether `error` says that there is no gradient, as opposed to any other failure."""
    return any(words in str(error) for words in _NO_GRADIENT)


def differentiable(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits of `x` [B, ...] depend on it in a way that PyTorch can differentiate; model in eval mode."""
    point = x[:1].detach().requires_grad_()
    try:
        with torch.enable_grad():
            logits = model(point)
        (gradient,) = torch.autograd.grad(logits.sum(), point, allow_unused=True)
    except RuntimeError as error:
        if lacks_gradient(error):
            return False
        raise
    return gradient is not None


@torch.no_grad()
def spread(model: Logits, x: Tensor, passes: int = 5) -> tuple[float, float]:
    """How much answers to the same question differ: the share of labels that change, the largest relative change.

    The latter is ||z_i - z_1|| / ||z_1|| over all logits of the batch, as AutoAttack's own check has it.
    """
    first = model(x)
    norm = float(first.norm().clamp_min(1e-12))
    labels, distance = torch.zeros(len(x), dtype=torch.bool, device=x.device), 0.0
    for _ in range(passes - 1):
        again = model(x)
        labels |= again.argmax(1) != first.argmax(1)
        distance = max(distance, float((again - first).norm()) / norm)
    return float(labels.float().mean()), distance


@torch.no_grad()
def are_probabilities(model: Logits, x: Tensor) -> bool:
    """Whether all rows lie in [0, 1] and sum to 1 within 1e-5: a softmax where logits should be."""
    outputs = model(x)
    sums = outputs.sum(1)
    inside = bool(outputs.min() > -1e-5) and bool(outputs.max() < 1 + 1e-5)
    return inside and bool(((sums - 1).abs() < 1e-5).all())


def zero_gradient_shares(model: Logits, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The share of points whose input gradient is zero in every pixel: of the cross-entropy, and of the DLR loss.

    Of the correctly classified ones: where the label comes third, the DLR loss is constant for good reasons.
    """
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    if not len(x):
        return 0.0, 0.0

    def share(loss: AttackLoss) -> float:
        gradient, _, _ = input_gradient(model, x, partial(_on, loss, y))
        return float((gradient.flatten(1).abs().amax(1) == 0).float().mean())

    return share(cross_entropy), share(dlr)


def thresholding(model: Logits, x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """How little the model would notice if its inputs were black and white, and how much of its gradient is zero.

    The least relative change of the logits, ||z(1[x > t]) - z(x)|| / ||z(x)|| over the batch, for t = 0.3, 0.5 and
    0.7; and the share of entries of the margin's input gradient that are exactly zero. None where nothing can be seen:
    the inputs are black and white themselves, or logits are not finite.
    """
    least = torch.inf
    with torch.no_grad():
        logits = model(x)
        for level in (0.3, 0.5, 0.7):
            stark = (x > level).to(x.dtype)
            if float((stark - x).abs().mean()) < 0.01:
                return None
            change = float((model(stark) - logits).norm() / logits.norm().clamp_min(1e-12))
            if not math.isfinite(change):
                return None
            least = min(least, change)
    gradient, _, _ = input_gradient(model, x, partial(_on, margin, y))
    return least, float((gradient == 0).double().mean())


def _on(loss: AttackLoss, labels: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, labels)


@torch.no_grad()
def differentiates_inside(model: Logits, x: Tensor) -> bool:
    """Whether the forward pass itself computes gradients: an optimisation loop at test time."""
    with _counting_backward() as calls:
        model(x[:2])
    return bool(calls)


@contextmanager
def _counting_backward() -> Iterator[list[str]]:
    """The names of the autograd entry points that are called inside; both are put back, whatever happens."""
    calls: list[str] = []
    originals = {name: getattr(torch.autograd, name) for name in ("grad", "backward")}

    def counted(name: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return originals[name](*args, **kwargs)

    try:
        for name in originals:
            setattr(torch.autograd, name, partial(counted, name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)
