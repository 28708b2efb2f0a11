"""Counterexamples: looked for by descent, and believed only after two independent evaluations."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from trivet.certify.queries import Queries, Search, Witness
from trivet.certify.vnnlib import Case, Property
from trivet.randomness import generator

STARTS, STEPS = 64, 60


class Confirm:
    """Decides whether a point, rounded to float32, is a counterexample, in exact arithmetic.

    The box and the constraints are compared with as rational numbers, without tolerance; and they must hold both for
    the outputs of `runtime`, which evaluates the network in float32 as its users do, and for `reference`, the network
    as a function of real numbers.

    Attributes:
        runtime: an input [n] in float32 to its outputs [m].
        reference: an input [n] to its outputs, exactly, or as exactly as can be had.
    """

    def __init__(
        self, prop: Property, runtime: Callable[[Tensor], Tensor], reference: Callable[[Tensor], list[Fraction]]
    ) -> None:
        self.cases = [case for case in prop.cases for _ in case.conjunctions]
        self.runtime, self.reference = runtime, reference

    def __call__(self, query: int, point: Tensor) -> Witness | None:
        case = self.cases[query]
        lower, upper = _floats_inside(case)
        if not bool((lower <= upper).all()):  # the box holds no float32 at all
            return None
        x = point.float().clamp(lower, upper)
        if not bool(x.isfinite().all()):
            return None
        y = self.runtime(x)
        if not bool(y.isfinite().all()):
            return None
        inputs = [Fraction(value) for value in x.tolist()]
        outputs = [Fraction(value) for value in y.tolist()]
        if not (case.met_by(inputs, outputs) and case.met_by(inputs, self.reference(x))):
            return None
        return Witness(tuple(x.tolist()), tuple(y.tolist()))


@lru_cache(maxsize=4)
def _floats_inside(case: Case) -> tuple[Tensor, Tensor]:
    """The least and the largest float32 within the exact bounds of each input."""
    ends = []
    for bounds, inward in ((case.lower, torch.inf), (case.upper, -torch.inf)):
        near = torch.tensor([float(value) for value in bounds]).float()
        toward = torch.full_like(near, inward)
        outside = [
            exact > value if inward > 0 else exact < value
            for exact, value in zip(bounds, map(Fraction, near.tolist()), strict=True)
        ]
        ends.append(near.nextafter(toward).where(torch.tensor(outside), near))
    return ends[0], ends[1]


def attack(network: Callable[[Tensor], Tensor], queries: Queries, run: Search, seed: int) -> bool:
    """Whether descent on the worst constraint, from random starts, finds a counterexample; it is in `run.witness`.

    PGD (Madry et al., ICLR 2018) with sign steps of a tenth of each input's width, down to a thousandth.

    Args:
        network: outputs [B, m] in float64 for inputs [B, n], differentiable.
    """
    for query in range(len(queries)):
        lower, upper = queries.lower[query], queries.upper[query]
        width = upper - lower
        random = torch.rand(STARTS, len(lower), generator=generator(seed, "attack", query), dtype=torch.float64)
        x = torch.cat([(lower + upper)[None] / 2, lower + random * width])
        index = torch.full((len(x),), query)
        for step in range(STEPS):
            if run.late:
                return False
            x.requires_grad_()
            values = queries.values(network(x), index)
            if run.falsified(x.detach(), index, values.detach(), tries=1):
                return True
            if not values.shape[1]:
                break
            (gradient,) = torch.autograd.grad(values.amax(1).sum(), x)
            with torch.no_grad():
                x = (x - 0.1 * 0.01 ** (step / STEPS) * width * gradient.sign()).clamp(lower, upper)
    return False
