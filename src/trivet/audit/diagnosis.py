"""Per-sample diagnosis: slope, curvature and stretch of a model at single records, to set against certified radii.

The three measures with which Wu et al. ("Augment then Smooth: Reconciling Differential Privacy with Certified
Robustness", TMLR 2024) ask why some private models certify larger radii than others. They are about the network f
itself, not about the classifier that smoothing makes of it, and none of them is a certificate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trivet.audit.findings import DiagnosisFinding
from trivet.audit.gradients import lacks_gradient
from trivet.certify.certifier import Certificates
from trivet.display import Advance
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits
from trivet.randomness import generator
from trivet.threats.losses import cross_entropy

BALL = 0.01
"""Radius of the l_inf ball in which the Lipschitz constant is sought, in pixel units."""
ASCENT_STEPS, ASCENT_STEP, ASCENT_START = 10, 0.003, 0.001
POWER_STEPS = 50


@dataclass(frozen=True)
class PerSample:
    """What was measured at each of N records, [N] float64 each.

    Attributes:
        gradient: || grad_x CE ||_2, per unit of pixel value.
        curvature: the largest |eigenvalue| of the Hessian of CE in x, as far as power iteration found it; None where
            the model cannot be differentiated twice.
        lipschitz: the largest || f(x) - f(x') ||_1 / || x - x' ||_inf found near x; the true constant is no smaller.
    """

    gradient: Tensor
    curvature: Tensor | None
    lipschitz: Tensor


class Stretch(NamedTuple):
    """The largest ratio found for each input [B], and the point [B, ...] where."""

    ratio: Tensor
    x: Tensor


def diagnose(
    model: nn.Module, x: Tensor, y: Tensor, *, seed: int, batch_size: int, advance: Advance | None = None
) -> PerSample:
    """Measure a differentiable `model` with fixed answers at `x` [N, ...] with labels `y` [N].

    Start vectors are drawn for all records at once, so that what is found does not depend on `batch_size`.
    `advance` is told of progress, in records.
    """
    gradients, curvatures, ratios = [], [], []
    direction, offset = (
        torch.randn(x.shape, generator=generator(seed, "diagnosis", name), dtype=x.dtype).to(x.device)
        for name in ("curvature", "lipschitz")
    )
    twice = True
    with evaluating(model):
        for part in torch.arange(len(x), device=x.device).split(batch_size):
            gradients.append(gradient_norm(model, x[part], y[part]))
            if twice:
                found = curvature(model, x[part], y[part], direction[part])
                twice = found is not None
                curvatures += [] if found is None else [found]
            ratios.append(local_lipschitz(model, x[part], offset[part]).ratio)
            if advance is not None:
                advance(len(part))
    slope, stretch = (torch.cat(each).double().cpu() for each in (gradients, ratios))
    return PerSample(slope, torch.cat(curvatures).double().cpu() if twice else None, stretch)


def gradient_norm(model: Logits, x: Tensor, y: Tensor) -> Tensor:
    """|| grad_x CE(f(x), y) ||_2 of each input, [B]."""
    return _slope(model, x, y)[1].detach().flatten(1).norm(dim=1)


def curvature(model: Logits, x: Tensor, y: Tensor, start: Tensor, steps: int = POWER_STEPS) -> Tensor | None:
    """max_i |lambda_i| of H = grad_x^2 CE(f(x), y) for each input, [B]; None if `model` has no second derivative.

    Power iteration from `start` [B, ...] on Hessian-vector products: v <- H v / ||H v||, and ||H v|| for the last v.
    H is symmetric, so ||H v|| never exceeds the largest |eigenvalue|, and rises to it, also where lambda and -lambda
    are both eigenvalues. A network of ReLUs is linear piece by piece: H is then J^T (diag p - p p^T) J, the curvature
    of the cross-entropy alone, and kinks between the pieces, however near, do not count.
    """
    try:
        point, gradient = _slope(model, x, y, create_graph=True)
        v, length = _normalised(start)
        for _ in range(steps):
            (product,) = torch.autograd.grad(gradient, point, v, retain_graph=True)
            v, length = _normalised(product)
    except RuntimeError as error:
        if lacks_gradient(error) or "once_differentiable" in str(error):
            return None
        raise
    return length


def local_lipschitz(model: Logits, x: Tensor, offset: Tensor) -> Stretch:
    """max || f(x) - f(x') ||_1 / || x - x' ||_inf over || x - x' ||_inf <= 0.01 in [0, 1], as far as ascent finds it.

    Ten steps of 0.003 along the sign of the ratio's gradient, from x + 0.001 `offset`, where `offset` [B, ...] is
    standard normal; the best point on the way counts. f are the logits: constants of models whose logits have other
    scales do not compare.
    """
    with torch.no_grad():
        here = model(x)
    low, high = (x - BALL).clamp_min(0.0), (x + BALL).clamp_max(1.0)
    moved = (x + ASCENT_START * offset).clamp(low, high)
    best, at = torch.zeros(len(x), dtype=here.dtype, device=x.device), x
    for step in range(ASCENT_STEPS + 1):
        point = moved.detach().requires_grad_()
        apart = (point - x).flatten(1).abs().amax(1)
        stretched = (model(point) - here).flatten(1).abs().sum(1)
        ratio = stretched / apart.where(apart > 0, 1.0)
        better = ratio.detach() > best
        best = torch.where(better, ratio.detach(), best)
        at = torch.where(better.view(-1, *[1] * (x.ndim - 1)), point.detach(), at)
        if step < ASCENT_STEPS:
            (gradient,) = torch.autograd.grad(ratio.sum(), point)
            moved = (point.detach() + ASCENT_STEP * gradient.sign()).clamp(low, high)
    return Stretch(best, at)


def _slope(model: Logits, x: Tensor, y: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """The inputs as a leaf, and grad_x CE there, [B, ...]."""
    point = x.detach().requires_grad_()
    loss = cross_entropy(model(point), y).sum()  # each record's loss depends on its own input alone
    (gradient,) = torch.autograd.grad(loss, point, create_graph=create_graph)
    return point, gradient


def _normalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `v` at length 1 (rows of zeros stay), and the lengths [B]."""
    length = v.flatten(1).norm(dim=1)
    return v / length.clamp_min(torch.finfo(v.dtype).tiny).view(-1, *[1] * (v.ndim - 1)), length


def finding(measured: PerSample, certificates: Certificates, targets: Tensor, seconds: float) -> DiagnosisFinding:
    """What was measured at the certified records with labels `targets` [N], beside their radii."""
    radius = certificates.radii.where(certificates.labels == targets, 0.0)
    lists = {name: values for name, values in vars(measured).items() if values is not None}
    finite = torch.stack([values.isfinite() for values in lists.values()]).all(0)
    radius, lists = radius[finite], {name: values[finite] for name, values in lists.items()}
    rows = {name: tuple(values.tolist()) for name, values in lists.items()}
    return DiagnosisFinding(
        norm=certificates.norm,
        radius=tuple(radius.tolist()),
        rank_correlation={name: rank_correlation(values, radius) for name, values in lists.items()},
        left_out=int((~finite).sum()),
        seconds=seconds,
        gradient=rows["gradient"],
        curvature=rows.get("curvature"),
        lipschitz=rows["lipschitz"],
    )


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rho of two rows of numbers [N], ties sharing their mean rank; None where one of them is constant."""
    from scipy.stats import rankdata

    x, y = (torch.from_numpy(rankdata(each.numpy())) - (len(each) + 1) / 2 for each in (a, b))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else None
