"""Complete answers about small networks: branch and bound on linear bounds, after an attack.

    verdict = verify(load_model("acas.onnx"), read_vnnlib("prop_2.vnnlib"), timeout=116)

The property (`trivet.certify.vnnlib`) says what a counterexample is. Networks of few inputs are decided by cutting the
box of inputs (`input_splits`), others by cases of which side of 0 their rectifiers are on (`relu_splits`). The first
way ends with an answer for every property whose constraints are met, or excluded, by some margin, if time allows; the
second may also end where all rectifiers are decided and the multipliers found do not suffice.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from trivet.certify import input_splits, relu_splits
from trivet.certify.bounds.network import Box, Network
from trivet.certify.bounds.rounding import Arithmetic
from trivet.certify.counterexample import Confirm, attack
from trivet.certify.dense_crown import DenseNetwork, Linear
from trivet.certify.queries import (
    Answer,
    Queries,
    Search,
    UnsoundBound,
    Verdict,
    Witness,
    least_value,
    shifted,
)
from trivet.certify.vnnlib import Property
from trivet.errors import TrivetError, require

FEW_INPUTS = 12
"""Up to so many inputs with any width the box of inputs is cut; more make too many boxes."""


class SharedBounds:
    """Any network that has bounds, as what `input_splits.search` asks for: slower than `DenseNetwork`, and general."""

    def __init__(self, network: Network, reference: Callable[[Tensor], Tensor], arithmetic: Arithmetic) -> None:
        self.network, self.reference, self.arithmetic = network, reference, arithmetic
        self.batch = 64

    def __call__(self, x: Tensor) -> Tensor:
        return self.reference(x)

    def intervals(self, lower: Tensor, upper: Tensor) -> Tensor:
        return lower.new_zeros(len(lower), 0)

    def bound(self, lower: Tensor, upper: Tensor, known: Tensor, box: Tensor, rows: Tensor) -> Linear:
        shape = self.network.shapes[0]
        domain = Box(lower[box].view(-1, *shape), upper[box].view(-1, *shape))
        slope, constant = self.network.lines(domain, rows[:, None, :-1], arithmetic=self.arithmetic)
        slope, constant = slope.flatten(1), shifted(constant.squeeze(1), rows[:, -1])
        return Linear(box, slope, constant, least_value(slope, constant, lower[box], upper[box]), (), ())

    def importance(self, width: Tensor, known: Tensor, found: Linear) -> Tensor:
        return width * torch.zeros_like(width).index_add_(0, found.box, found.slope.abs())


def verify(
    model: nn.Module,
    prop: Property,
    *,
    shape: Sequence[int],
    timeout: float,
    runtime: Callable[[Tensor], Tensor] | None = None,
    arithmetic: Arithmetic = "float32",
    seed: int = 0,
) -> Verdict:
    """Whether `model` has a counterexample to the property.

    "verified" is a proof, in floating point with error terms. "falsified" comes with a witness that lies in the exact
    box and meets the exact constraints, both by the outputs of `runtime` and by the network in exact arithmetic (in
    float64, where it is no chain of dense layers); where the two disagree, the search goes on.

    Args:
        model: maps [B, *shape] to outputs [B, m]; float32.
        shape: of one input; the property's X_i are its numbers in order.
        timeout: seconds, from the call; a batch under way is finished.
        runtime: what the network's users run, [n] float32 to [m]; the model itself if None.
        arithmetic: what "verified" is about: "float32", the network as a function of real numbers on the real box and
            every evaluation of it in float32, whatever the order of its sums; "real", the former alone, with bounds
            that are a little tighter. A network built to round badly may differ between the two.
        seed: of the attack.

    Raises:
        TrivetError: a property that does not fit the network, or a network without bounds.
    """
    started = time.monotonic()
    require(timeout > 0, f"timeout={timeout} must be above 0.")
    network = Network.of(model, shape)
    inputs = math.prod(shape)
    if (prop.inputs, prop.outputs) != (inputs, network.classes):
        raise TrivetError(
            f"the property is about {prop.inputs} inputs and {prop.outputs} outputs, and the network has {inputs} and "
            f"{network.classes}; check that the two files belong together."
        )
    require(
        arithmetic == "real" or network.dtype == torch.float32,
        f"arithmetic='float32' must be asked of float32 weights, and these are {network.dtype}.",
    )
    finite = all(bool(value.isfinite().all()) for value in model.state_dict().values() if value.is_floating_point())
    require(finite, "the network has weights that are no finite numbers.")
    dense = DenseNetwork.of(network, arithmetic)
    precise = copy.deepcopy(model).double().eval()

    def reference(x: Tensor) -> Tensor:
        return dense(x) if dense else precise(x.view(-1, *shape))

    def exactly(x: Tensor) -> list[Fraction]:
        return dense.exactly(x) if dense else [Fraction(v) for v in precise(x.double().view(1, *shape))[0].tolist()]

    def as_users_do(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x.view(1, *shape))[0]

    queries = Queries.of(prop)
    run = Search(Confirm(prop, runtime or as_users_do, exactly), started + timeout)

    def verdict(answer: Answer, reason: str, witness: Witness | None = None) -> Verdict:
        late = answer == "unknown" and run.late
        return Verdict(answer, reason, arithmetic, run.boxes, time.monotonic() - started, witness, late)

    try:
        proved = not len(queries)
        if not proved and not attack(reference, queries, run, seed):
            few = int(((queries.upper > queries.lower).sum(1)).max()) <= FEW_INPUTS
            if dense and not few:
                proved = relu_splits.search(network, dense, queries, run)
            else:
                bounder = dense or SharedBounds(network, reference, arithmetic)
                proved = input_splits.search(bounder, queries, run)
    except UnsoundBound as error:
        return verdict("error", str(error))
    if run.witness is not None:
        return verdict("falsified", "a counterexample was found and evaluated again.", run.witness)
    if proved and not len(queries):
        return verdict("verified", "the property's assertions contradict each other: nothing is a counterexample.")
    if proved:
        return verdict("verified", "linear bounds exclude counterexamples from every part of the inputs.")
    if run.late:
        return verdict("unknown", f"{timeout:.4g} s were not enough to decide every part of the inputs.")
    return verdict("unknown", "some part of the inputs can neither be decided nor be cut further.")
