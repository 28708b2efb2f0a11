"""What methods of certified training share: a growing radius, the weight of the clean loss, and bounds in a step.

    kappa CE(z(x), y) + (1 - kappa) R(x, y) + regularizer (1 - eps_t / eps_max) W

R is the robust term, in which methods differ; W the warm-up regularizer of Shi et al. 2021. The radius eps_t grows from
0 to eps_max in a part of training; kappa falls with it, tied to the radius and not to time, from 1 to `kappa_end`.

None of these losses is a certificate. Only bounds computed afterwards, for the finished weights, are (`certify`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.certify.bounds.affine import merged
from trivet.certify.bounds.interval import Box, Interval
from trivet.certify.bounds.layer import Layer
from trivet.certify.bounds.network import Network, margin_rows
from trivet.certify.bounds.steps import Reader
from trivet.data.dataset import Batch, Dataset
from trivet.errors import require
from trivet.models.batch_statistics import held_at, training_norms
from trivet.models.modes import device_of, evaluating
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.warm_up import warm_up_penalty
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel

_KNOWN: dict[int, tuple[ref[nn.Module], tuple[object, ...], Network]] = {}
"""Networks by the identity of their model, the oldest first: a few, because they keep layers alive."""
_MOST_KNOWN = 16
_LEAST = 1e-6
"""The radius at which the warm-up regularizer looks at a network while eps_t is 0."""


@dataclass(frozen=True)
class GrowingRadius(Objective):
    """The course of a training for certificates. Radii are l_inf, in input units; fractions are of the whole training.

    Attributes:
        threat: the l_inf ball that the network is to withstand.
        train_eps: eps_max, the radius trained at; None is that of `threat`. A larger one often certifies better.
        ramp: the fractions of training at which eps_t starts and ends to grow; by default CTBench's for MNIST, 20 of
            70 epochs.
        ramp_shape: of the growth, "linear", or "smooth": a fourth power in its first quarter, then linear.
        kappa_end: the share of the clean loss at the full radius.
    """

    threat: ThreatModel
    train_eps: float | None = None
    ramp: tuple[float, float] = (0.0, 2 / 7)
    ramp_shape: Literal["linear", "smooth"] = "linear"
    kappa_end: float = 0.5

    def __post_init__(self) -> None:
        require(
            self.threat.norm == "Linf", f"threat={self.threat} must be an l_inf ball: the bounds are those of boxes."
        )
        require(
            self.train_eps is None or 0 <= self.train_eps <= 1, f"train_eps={self.train_eps} must lie between 0 and 1."
        )
        require(
            0 <= self.ramp[0] <= self.ramp[1] <= 1, f"ramp={self.ramp} must be two fractions of training, in order."
        )
        require(self.ramp_shape in ("linear", "smooth"), f"ramp_shape={self.ramp_shape!r} must be linear or smooth.")
        require(0 <= self.kappa_end <= 1, f"kappa_end={self.kappa_end} must lie in [0, 1].")

    @property
    def eps_max(self) -> float:
        return self.threat.eps if self.train_eps is None else self.train_eps

    def grown(self, progress: Progress) -> float:
        """eps_t / eps_max, in [0, 1]."""
        start, end = self.ramp
        if progress.fraction >= end:
            return 1.0
        if progress.fraction <= start:
            return 0.0
        t = (progress.fraction - start) / (end - start)
        return t if self.ramp_shape == "linear" else smooth(t)

    def kappa(self, progress: Progress) -> float:
        """The share of the clean loss."""
        return 1 - (1 - self.kappa_end) * self.grown(progress)

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        if self.grown(progress) > 0:
            with torch.autocast(batch.inputs.device.type, enabled=False):
                network_of(model, batch.inputs.shape[1:])  # read here: under vmap, where `losses` may be, it cannot be
        return super().perturb(model, batch, progress)

    def judge(self, model: nn.Module, held: Dataset, progress: Progress) -> Mapping[str, float]:
        """Which share of the held-out records interval bounds certify at the radius of `threat`, rounding aside."""
        device, certified = device_of(model), 0
        with torch.no_grad():
            network = network_of(model, held.input_shape)
            for batch in (each.to(device) for each in held.batches(500)):
                margins = network.margins(clipped_box(batch.inputs, self.threat.eps), batch.labels, method="ibp")
                certified += int((margins > 0).all(1).sum())
        return {"held_ibp": certified / len(held)}


@dataclass(frozen=True)
class CertifiedTraining(GrowingRadius):
    """The loss above, for methods whose robust term comes from bounds.

    BatchNorm in training mode normalises by the clean batch; attack and bounds of the step see it frozen there.
    Bounds are computed in the type of the weights without error terms, also when the clean pass runs in bfloat16.

    Without W every record has a loss of its own, which may be trained privately. Bounds read weights outside of the
    layers' own passes, so clipping takes the engine that holds each record's gradient, `materialised`; `auto` does.

    Attributes:
        regularizer: weight of W, which falls to 0 as the radius grows; 0.5 in Shi et al.
    """

    regularizer: float = 0.0

    @property
    def record_isolated(self) -> bool:  # type: ignore[override]
        return self.regularizer == 0  # W is one number, of means over all records

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.regularizer >= 0, f"regularizer={self.regularizer} must not be negative.")

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        grown, kappa = self.grown(progress), self.kappa(progress)
        weight = self.regularizer * (1 - grown)
        eps = max(grown * self.eps_max, _LEAST if weight else 0.0)
        if eps == 0:  # every robust term is the clean loss there
            return Losses(cross_entropy(model(batch.inputs), batch.labels))
        log: dict[str, Tensor] = {}
        # No clean pass is made where nothing asks for it.
        needed = kappa > 0 or training_norms(model)
        clean: AbstractContextManager[Tensor | None] = held_at(model, batch.inputs) if needed else evaluating(model)
        with clean as logits:
            total = torch.zeros_like(batch.labels, dtype=batch.inputs.dtype)
            if logits is not None:
                natural = cross_entropy(logits, batch.labels)
                total, log["natural"] = kappa * natural, natural.detach()
            with torch.autocast(batch.inputs.device.type, enabled=False):
                network = network_of(model, batch.inputs.shape[1:])
                step = Step(model, network, batch, perturbed.detach(), eps, grown, progress)
                robust = self.robust(step)
                total, log["robust"] = total + (1 - kappa) * robust.losses, robust.losses.detach()
                if weight:
                    before = [robust.intervals[node] for _, node in step.network.activations]
                    penalty = warm_up_penalty(robust.intervals[0], before)
                    total, log["regularizer"] = total + weight * penalty, penalty.detach()
        return Losses(total, log)

    @abstractmethod
    def robust(self, step: Step) -> Robust:
        """The robust term R and the intervals that W is to look at."""


class Robust(NamedTuple):
    """What a method returns.

    Attributes:
        losses: R, [B].
        intervals: of every node of the network, over the box that was bounded.
    """

    losses: Tensor
    intervals: Sequence[Interval]


@dataclass(frozen=True, eq=False)
class Step:
    """One training step at radius `eps`, `grown` times the last one; `network` is `model` as of the clean pass."""

    model: nn.Module
    network: Network
    batch: Batch
    perturbed: Tensor
    eps: float
    grown: float
    progress: Progress

    @cached_property
    def box(self) -> Box:
        """The ball around the clean inputs, within [0, 1]."""
        return clipped_box(self.batch.inputs, self.eps)

    @cached_property
    def rows(self) -> Tensor:
        """Of the margins, [B, K - 1, K]."""
        return margin_rows(self.batch.labels, self.network.classes).to(self.network.dtype)

    @cached_property
    def intervals(self) -> Sequence[Interval]:
        """Of every node over `box`."""
        return self.network.intervals(self.box)

    @cached_property
    def lower(self) -> Tensor:
        """Lower bounds [B, K - 1] of all margins over `box`, by interval arithmetic."""
        return self.network.margins(self.box, self.batch.labels, method="ibp", intervals=self.intervals)


def network_of(model: nn.Module, shape: Sequence[int]) -> Network:
    """`Network.of` the model, read anew only when its layers are others than last time: its weights always are."""
    weight = next(model.parameters())
    modules = ((name, id(module), type(module)) for name, module in model.named_modules())
    layout = (tuple(shape), weight.dtype, weight.device, *modules)
    known = _KNOWN.get(id(model))
    if known and known[0]() is model and known[1] == layout:
        return known[2]
    network = Network.of(model, shape)
    for key in [key for key, (of, _, _) in _KNOWN.items() if of() in (None, model)]:
        del _KNOWN[key]
    while len(_KNOWN) >= _MOST_KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    _KNOWN[id(model)] = ref(model), layout, network
    return network


def layers(network: Network) -> list[tuple[Layer, tuple[int, ...]]]:
    """Each layer with the weights of now, and the nodes it reads; layer i makes node i + 1, node 0 is the input.

    A BatchNorm is taken into the layer before it, where it costs nothing; the node between them shows the same as it.
    """
    inputs = [step.inputs for step in network.steps]
    return list(zip(merged([step.make(Reader()) for step in network.steps], inputs), inputs, strict=True))


def clipped_box(x: Tensor, eps: float) -> Box:
    """The l_inf ball around `x` within [0, 1]."""
    return Box((x - eps).clamp(min=0.0), (x + eps).clamp(max=1.0))


def smooth(t: float) -> float:
    """0 to 1 over t in [0, 1]: a t^4 in the first quarter, then the tangent; as in the code of Xu et al. 2020."""
    middle = 0.25
    a = 1 / ((1 - middle) * 4 * middle**3 + middle**4)
    return a * t**4 if t < middle else a * middle**4 + a * 4 * middle**3 * (t - middle)


def robust_cross_entropy(lower: Tensor) -> Tensor:
    """CE([0, -lower], 0), [B]: the loss if every margin z_y - z_j were at its lower bound [B, K - 1] at once."""
    logits = torch.cat([lower.new_zeros(len(lower), 1), -lower], 1)
    return F.cross_entropy(logits, logits.new_zeros(len(lower), dtype=torch.int64), reduction="none")
