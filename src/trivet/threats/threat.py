"""The protocol of a threat model: the set of inputs an adversary may present in place of `x`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor


class ThreatModel(ABC):
    """A perturbation set S(x) of [0, 1]-valued inputs around each input of a batch [B, ...].

    Every method returns points of the set, exactly: what `project` returns, `contains` accepts.
    """

    room: ClassVar[str] = "threats"
    norm: ClassVar[str]
    """"Linf", "L2", "L1", …: how reports and certificates name the geometry."""
    eps: float

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The point of S(x) that stands for `x_adv`: in the ball and in [0, 1]."""

    @abstractmethod
    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of S(x), as the field's attacks start from."""

    @abstractmethod
    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        """`x_adv` moved by `step` along the steepest ascent direction of this geometry; not yet projected.

        `step` is a number or a tensor that broadcasts, e.g. [B, 1, 1, 1].
        """

    @abstractmethod
    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """[B] bool: which points lie in S(x), judged in float64 without tolerance."""

    def scaled(self, factor: float) -> Self:
        """The same set with its radius multiplied by `factor`: for ramps and reliability curves."""
        return replace(self, eps=factor * self.eps)  # type: ignore[type-var]  # every threat model is a dataclass

    @property
    def members(self) -> tuple[ThreatModel, ...]:
        """The sets of one type that this one is the union of; itself, unless it is a union."""
        return (self,)


def batch_norms(delta: Tensor, p: float) -> Tensor:
    """The p-norm of each perturbation of a batch, shaped [B, 1, …] to broadcast over it."""
    flat = delta.flatten(1)
    # The maximum is eight times faster than PyTorch's own infinity norm.
    norms = flat.abs().amax(1) if p == math.inf else torch.linalg.vector_norm(flat, ord=p, dim=1)
    return norms.view(-1, *[1] * (delta.ndim - 1))
