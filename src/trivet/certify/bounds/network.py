"""Lower bounds of what a network answers on a whole set of inputs: IBP, CROWN-IBP, CROWN and alpha-CROWN.

    network = Network.of(model, (1, 28, 28))
    margins = network.margins(Ball(x, eps), margin_rows(labels, 10), method="crown", arithmetic="float32")
    proved = (margins > 0).all(1)

IBP: Gowal et al. 2018 (Mirman et al., ICML 2018, as boxes). CROWN: Zhang et al., NeurIPS 2018; CROWN-IBP: Zhang et al.,
ICLR 2020; linear bounds backward through any graph: Xu et al., NeurIPS 2020; alpha-CROWN: Xu et al., ICLR 2021. Same
slopes ("same") are Fast-Lin (Weng et al., ICML 2018), the dual of Wong & Kolter's linear programme (ICML 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.certify.bounds.activations import Rectifier
from trivet.certify.bounds.affine import merged
from trivet.certify.bounds.interval import Ball, Box, Domain, Interval
from trivet.certify.bounds.neurons import Neurons
from trivet.certify.bounds.propagation import Lines, Propagation
from trivet.certify.bounds.rounding import Arithmetic, Rounding
from trivet.certify.bounds.slopes import chosen
from trivet.certify.bounds.steps import Reader, Step
from trivet.certify.bounds.tracing import traced
from trivet.errors import require

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
Slope = Literal["adaptive", "zero", "one", "same"]

__all__ = ["Ball", "Box", "Network", "margin_rows"]


def margin_rows(labels: Tensor, classes: int) -> Tensor:
    """[B, K - 1, K]: the rows e_y - e_j for every class j other than the label y [B], in order of j."""
    eye = torch.eye(classes, device=labels.device)
    return eye[labels][:, None] - eye[_others(labels, classes)]


def _others(labels: Tensor, classes: int) -> Tensor:
    """[B, K - 1], the classes other than the label, in order."""
    others = torch.arange(classes - 1, device=labels.device)
    return others + (others >= labels[:, None])


@dataclass(frozen=True, eq=False)
class Network:
    """A model's layers, in eval mode, with bounds; its weights are read at every use, so that they may be trained.

    Attributes:
        steps: in order of computation; step i makes node i + 1, and node 0 is the input.
        shapes: of one record at every node.
        activations: for each rectifier (its node, the node of its pre-activation).
        dtype: of the weights.
    """

    steps: tuple[Step, ...]
    shapes: tuple[torch.Size, ...]
    activations: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, shape: Sequence[int]) -> Network:
        """The network of `model` for inputs [B, *shape]. Dropout is left out, and BatchNorm uses running statistics.

        Certified training bounds the network that the clean pass of the same step computed: within
        `trivet.models.batch_statistics.held_at` the running statistics are those of the batch, with their gradients.

        Raises:
            BadValue: a layer without bounds, hooks, or a forward that is no fixed sequence of steps.
        """
        steps, shapes, dtype = traced(model, shape)
        require(
            len(shapes[-1]) == 1, f"the model must return logits [B, K], got [B, {', '.join(map(str, shapes[-1]))}]."
        )
        layers = [step.make(Reader()) for step in steps]
        rectifiers = [i for i, layer in enumerate(layers, 1) if isinstance(layer, Rectifier)]
        return cls(steps, tuple(shapes), tuple((i, steps[i - 1].inputs[0]) for i in rectifiers), dtype)

    @property
    def classes(self) -> int:
        return self.shapes[-1][0]

    def __call__(self, x: Tensor) -> Tensor:
        """The logits [B, K]."""
        values = [x]
        for step in self.steps:
            layer = step.make(Reader())
            values.append(layer(*(values[node] for node in step.inputs)))
        return values[-1]

    def margins(
        self,
        domain: Domain,
        specification: Tensor,
        *,
        method: Method = "crown",
        slope: Slope = "adaptive",
        arithmetic: Arithmetic | None = None,
        intervals: Sequence[Interval] | None = None,
        signs: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Lower bounds [B, S] of `specification` @ logits over `domain`; differentiable in weights and domain.

        `ibp` carries intervals forward, and merges the specification into the last affine layers. The others are one
        backward pass through linear relaxations of the rectifiers, whose intervals come from IBP (`crown-ibp`) or
        from backward passes of their own for the neurons that IBP leaves unstable (`crown`); these two bounds may
        fall below that of IBP, and where they do `crown` returns IBP's. `alpha-crown` starts there and improves the
        slopes for each row by 20 steps of gradient ascent, with those intervals.

        Args:
            specification: [B or 1, S, K], one row for each linear function of the logits; or labels [B], which stand
                for `margin_rows`, and are faster: of IBP then the rows of all pairs of classes serve every record.
            slope: of the line below unstable rectifiers: 1 where the upper end is farther from 0 than the lower,
                else 0 (`adaptive`), always 0 or 1 (`zero`, `one`), or the slope of the line above (`same`).
            arithmetic: what the bounds hold for: `float32`, every evaluation in float32 with sums in any order, and
                that of real numbers, computed in float64 with error terms, without gradients; `real`, for real
                numbers alone; None, for nothing certain, as they are computed in the type of the weights without
                error terms: for training.
            intervals: of every node, as `intervals` returns them, perhaps tightened; they are used as they are.
            signs: of pre-activations (nodes), [B, ...] of -1, 0 and 1: on which side of 0 each value is assumed to lie
                (0: on either). `alpha-crown` uses the assumption beyond what it says about `intervals`.

        Without `arithmetic`, `ibp` and `crown-ibp` work under torch.func.vmap, and domains are not checked.

        Raises:
            BadValue: a specification or slope of another form, or with `arithmetic` a domain that is none.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and arithmetic is None):
            use = self._use(domain, arithmetic)
            shared = specification.ndim == 1 and method == "ibp" and use.rounding is None and self.classes < len(domain)
            if shared:
                eye = torch.eye(self.classes, dtype=self.dtype, device=specification.device)
                rows = (eye[:, None] - eye).flatten(0, 1)[None]
            else:
                rows = self._rows(specification, use)
            known = self._given(use, method, slope, intervals, signs)
            last = len(self.steps)
            if use.rounded_outputs:  # whose lines are those of each record
                rows = rows.expand(len(domain), -1, -1)
            if method != "crown-ibp":
                interval_bound = use.least(*use.pull(rows, last, known, slope, affine_only=True), known)
                if shared:
                    others = _others(specification, self.classes)
                    return interval_bound.gather(1, self.classes * specification[:, None] + others)
                if method == "ibp":
                    return interval_bound
            rows = rows.expand(len(domain), -1, -1)
            bound = use.least(*use.pull(rows, last, known, slope), known)
            if method == "crown-ibp":
                return bound
            if method == "alpha-crown":
                bound = torch.maximum(bound, use.least(*self._pull_best(use, rows, last, known, signs), known))
            return torch.maximum(bound, interval_bound)

    def lines(
        self,
        domain: Domain,
        specification: Tensor,
        *,
        method: Method = "crown",
        slope: Slope = "adaptive",
        arithmetic: Arithmetic | None = None,
        intervals: Sequence[Interval] | None = None,
        signs: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The linear bound behind `margins`, for any method but IBP: rows [B, S, *shape] and constants [B, S].

        specification @ logits >= <rows, x> + constants for every x of the domain.
        """
        require(method != "ibp", "method='ibp' must be another: interval bounds are no lines.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and arithmetic is None):
            use = self._use(domain, arithmetic)
            rows = self._rows(specification, use).expand(len(domain), -1, -1)
            known = self._given(use, method, slope, intervals, signs)
            last = len(self.steps)
            if method == "alpha-crown":
                lines, constant = self._pull_best(use, rows, last, known, signs)
            else:
                lines, constant = use.pull(rows, last, known, slope)
            return lines[0], constant

    def intervals(
        self,
        domain: Domain,
        arithmetic: Arithmetic | None = None,
        *,
        method: Method = "ibp",
        slope: Slope = "adaptive",
        known: Sequence[Interval] | None = None,
        signs: Mapping[int, Tensor] | None = None,
    ) -> list[Interval]:
        """Intervals [B, ...] of every node over `domain`, never looser than those already `known`.

        By IBP (`ibp`, `crown-ibp`), or by backward passes for the unstable neurons of every layer, with the slopes of
        CROWN (`crown`) or the best found for each neuron (`alpha-crown`, some 50 times dearer). Without `arithmetic` a
        BatchNorm is taken into the layer before it, and the node between shows the same.

        Args:
            signs: as for `margins`. Where they contradict what is known, no input is left, and the interval of that
                value says nothing.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and arithmetic is None):
            return self._intervals(self._use(domain, arithmetic), method, slope, known, signs)

    def _intervals(
        self,
        use: Propagation,
        method: Method,
        slope: Slope,
        known: Sequence[Interval] | None,
        signs: Mapping[int, Tensor] | None,
    ) -> list[Interval]:
        def pull(rows: Tensor, node: int, found: Sequence[Interval]) -> Lines:
            return self._pull_best(use, rows, node, found, signs)

        def tighten(node: int, found: Sequence[Interval]) -> Interval:
            return use.tightened(node, found, pull)

        ways = {"crown": Neurons(use, slope).tightened, "alpha-crown": tighten}
        return use.intervals(known, tighten=ways.get(method), signs=signs)

    def _given(
        self,
        use: Propagation,
        method: Method,
        slope: Slope,
        given: Sequence[Interval] | None,
        signs: Mapping[int, Tensor] | None,
    ) -> list[Interval]:
        if given is not None:
            return [interval.on(signs[i]) if signs and i in signs else interval for i, interval in enumerate(given)]
        return self._intervals(use, "crown" if method == "alpha-crown" else method, slope, None, signs)

    def _rows(self, specification: Tensor, use: Propagation) -> Tensor:
        rows = margin_rows(specification, self.classes) if specification.ndim == 1 else specification
        require(
            rows.ndim == 3 and len(rows) in (1, len(use.domain)) and rows.shape[2] == self.classes,
            f"specification must be [{len(use.domain)}, S, {self.classes}], got {tuple(rows.shape)}.",
        )
        rows = rows.to(use.domain.dtype)
        return rows if use.rounding is None else rows.expand(len(use.domain), -1, -1)

    def _pull_best(
        self,
        use: Propagation,
        rows: Tensor,
        node: int,
        known: Sequence[Interval],
        signs: Mapping[int, Tensor] | None,
    ) -> Lines:
        """A linear bound with the best slopes found; sought without error terms, used with those of `use`."""
        rough = [Interval(each.lower.to(self.dtype), each.upper.to(self.dtype)) for each in known]
        found = chosen(self._use(use.domain, None), rows.to(self.dtype), node, rough, signs or {})
        slopes, multipliers = ({i: each.to(rows.dtype) for i, each in part.items()} for part in found)
        return use.pull(rows, node, known, slopes, multipliers=multipliers)

    def _use(self, domain: Domain, arithmetic: Arithmetic | None) -> Propagation:
        require(
            arithmetic != "float32" or self.dtype == torch.float32,
            f"arithmetic='float32' must be asked of float32 weights, and these are {self.dtype}.",
        )
        dtype = None if arithmetic is None else torch.float64
        read = Reader(dtype, arithmetic is not None)
        layers = [step.make(read) for step in self.steps]
        inputs = [step.inputs for step in self.steps]
        if arithmetic is None:
            return Propagation(merged(layers, inputs), inputs, domain.to(self.dtype), None)
        domain.check()
        return Propagation(layers, inputs, domain.to(torch.float64), Rounding.of(arithmetic, torch.float64))
