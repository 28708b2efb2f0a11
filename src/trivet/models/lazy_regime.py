"""How far two networks can come apart in training, as long as neither moves far: a diagnostic, never a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trivet.errors import require
from trivet.models.tangent_kernel import as_matrix

_LEAST, _DRIFT = 1e-6, 0.2


@dataclass(frozen=True)
class LazyBound:
    """|| f_s(t) - f_0(t) || at the trained inputs, for gradient flow of (1 / 2n) sum || f - y ||^2 with fixed kernels.

        <= exp(-lam t) * ( initial + gap * residual * t / n )  <=  initial + gap * residual / (n e lam)

    Attributes:
        initial: || f_s - f_0 || at the start, over all records and outputs.
        gap: the spectral norm of K_s - K_0.
        residual: || f_0 - y || at the start.
        lam: the smallest eigenvalue of either kernel, over n.
        records: n.
    """

    initial: float
    gap: float
    residual: float
    lam: float
    records: int

    def at(self, time: float) -> float:
        """The bound at a time, in units of steps times rate; a bound for any lam, growing where lam is negative."""
        return math.exp(-self.lam * time) * (self.initial + self.gap * self.residual * time / self.records)

    @property
    def ever(self) -> float:
        """The bound over all times; infinite where a kernel is singular."""
        if self.lam <= 0:
            return math.inf
        return self.initial + self.gap * self.residual / (self.records * math.e * self.lam)

    def void(
        self,
        *,
        drift: float | None,
        squared_loss: bool,
        batch_norm: bool,
        momentum_or_decay: bool,
        inputs_change: bool,
    ) -> tuple[str, ...]:
        """Why the bound says nothing about a training run; empty where it does.

        Args:
            drift: the norm of the change of the kernel over training, over its norm at the start; None: not known.
            squared_loss: whether the loss is the squared one; the cross-entropy has another flow.
            batch_norm: whether the network has BatchNorm.
            momentum_or_decay: whether the optimizer has momentum, adapts its rates, or decays weights.
            inputs_change: whether adversarial examples are made anew, as adversarial training always does.
        """
        reasons = []
        if self.lam <= _LEAST:
            reasons.append(f"a kernel is nearly singular (lam {self.lam:.3g})")
        if drift is None:
            reasons.append("the drift of the kernel over training is not known")
        elif drift > _DRIFT:
            reasons.append(f"the kernel moves by {drift:.0%} in training, so the network is too narrow")
        if not squared_loss:
            reasons.append("the loss is not the squared one")
        if batch_norm:
            reasons.append("the network has BatchNorm")
        if momentum_or_decay:
            reasons.append("the optimizer is not plain gradient descent")
        if inputs_change:
            reasons.append("adversarial examples are made anew at each step")
        return tuple(reasons)


def lazy_bound(reference: Tensor, kernel: Tensor, start: Tensor, own_start: Tensor, targets: Tensor) -> LazyBound:
    """The bound for two networks on n records: K_0 and K_s [n, n, C, C], outputs f_0 and f_s [n, C], targets y [n, C].

    Both kernels must be taken between the trained inputs and themselves. A mixed kernel K(X, X'), which is not
    symmetric, has no smallest eigenvalue and is refused. Computed in float64.
    """
    first, second = (as_matrix(each).double() for each in (reference, kernel))
    for each in (first, second):
        same = each.shape[0] == each.shape[1] and torch.allclose(
            each, each.T, rtol=1e-4, atol=1e-5 * float(each.abs().max())
        )
        require(same, "the kernels must be symmetric, between the same records; a mixed kernel has no such bound.")
    least = min(float(torch.linalg.eigvalsh(each)[0]) for each in (first, second))
    n = len(start)
    return LazyBound(
        initial=float((own_start - start).double().norm()),
        gap=float(torch.linalg.matrix_norm(second - first, 2)),
        residual=float((start - targets).double().norm()),
        lam=least / n,
        records=n,
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer of the network normalises by batches."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
