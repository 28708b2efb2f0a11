"""What certifiers by bounds share: margins of a network on a ball around each input, cheaper bounds first."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.certify.bounds.interval import Ball, Interval, Norm
from trivet.certify.bounds.network import Method, Network, Slope, margin_rows
from trivet.certify.bounds.rounding import LARGEST, Arithmetic
from trivet.certify.certifier import ABSTAIN, Certificates, Certifier
from trivet.certify.smoothing import positions
from trivet.display import Advance
from trivet.errors import TrivetError, require
from trivet.models.foreign.twinned import Twinned
from trivet.models.modes import evaluating


@dataclass(eq=False)
class Query:
    """Balls around B inputs, and what is known of them so far."""

    network: Network
    domain: Ball
    labels: Tensor
    arithmetic: Arithmetic
    known: list[Interval]

    def margins(self, method: Method, slope: Slope = "adaptive") -> Tensor:
        """[B, K - 1], from the intervals known."""
        return self.network.margins(
            self.domain,
            self.labels,
            method=method,
            slope=slope,
            arithmetic=self.arithmetic,
            intervals=self.known,
        )

    def tighten(self, method: Method, slope: Slope = "adaptive") -> None:
        self.known = self.network.intervals(
            self.domain,
            self.arithmetic,
            method=method,
            slope=slope,
            known=self.known,
        )

    def of(self, rows: Tensor) -> Query:
        """The same for some of the inputs; `rows` are their numbers."""
        domain = Ball(self.domain.x[rows], self.domain.eps[rows], self.domain.norm, self.domain.clip)
        known = [Interval(each.lower[rows], each.upper[rows]) for each in self.known]
        return Query(self.network, domain, self.labels[rows], self.arithmetic, known)


@dataclass(frozen=True)
class BoundCertifier(Certifier):
    """Proves that no input within `eps` of a given one changes the model's answer, by lower bounds of its margins.

    For each input x with answer y: m_j >= a bound of z_y - z_j over { x' in [0, 1]^D : ||x' - x||_p <= eps }; proved if
    every bound is positive. The bounds of a method are tried after all cheaper ones, on the inputs that those leave
    open, and the largest found for each margin counts. Of several radii the largest is tried first; the certificate's
    radius is the largest proved, and without any it abstains. A bound that is no finite number proves nothing.

    Everything is computed in float64 with error terms. About the model with the weights it has: eval mode, dropout
    off, BatchNorm by running statistics. Of a file that a runtime answers for, the answers are the runtime's, and the
    bounds those of its rebuilt graph, which hold for the runtime under the conditions that it states.

    Attributes:
        eps: the radius to prove, in units of the inputs, or several.
        norm: of the ball.
        arithmetic: what is certified: "float32", every evaluation of the model in float32, whatever the order of its
            sums, and of real numbers besides; "real", the model as a function of real numbers, for weights of any type.
        batch_size: inputs bounded together.
    """

    eps: float | tuple[float, ...]
    norm: Norm = "Linf"
    arithmetic: Arithmetic = "float32"
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(len(self.radii) > 0, "eps=[] must hold at least one radius.")
        require(all(0 < eps < math.inf for eps in self.radii), f"eps={self.eps} must be positive and finite.")
        require(self.norm in ("Linf", "L2", "L1"), f"norm={self.norm!r} must be 'Linf', 'L2' or 'L1'.")
        require(self.arithmetic in ("float32", "real"), f"arithmetic={self.arithmetic!r} must be 'float32' or 'real'.")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")

    @property
    def radii(self) -> tuple[float, ...]:
        """From the largest to the smallest."""
        return tuple(sorted(self.eps if isinstance(self.eps, (tuple, list)) else (self.eps,), reverse=True))

    @abstractmethod
    def bounds(self, query: Query) -> Iterator[Tensor]:
        """Lower bounds [B, K - 1] of the margins, cheaper ones first; each may tighten what `query` knows."""

    @torch.no_grad()
    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int = 0, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """Certificates for `x` [N, ...]; the evidence is `margin`, the least bound of a margin at the radius.

        At the smallest radius where nothing is proved. Without randomness: `seed` is ignored.

        Raises:
            TrivetError: inputs outside [0, 1], or a model without bounds.
        """
        index = positions(x, index)
        conditions = self._conditions(model)
        labels = torch.full((len(x),), ABSTAIN)
        radii, margins = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
        network = Network.of(model, x.shape[1:])
        require(network.classes > 1, "a model of one class must have another: there is nothing to certify.")
        with evaluating(model):
            for rows in torch.arange(len(x)).split(self.batch_size):
                logits = model(x[rows.to(x.device)].to(network.dtype))
                answers = logits.argmax(1)
                found, least = self._proved(network, x[rows.to(x.device)], logits, answers)
                radii[rows], margins[rows] = found.cpu(), least.cpu()
                labels[rows] = answers.cpu().where(found.cpu() > 0, ABSTAIN)
                if advance:
                    advance(len(rows))
        return Certificates(index, labels, radii, self.norm, 0.0, conditions, {"margin": margins})

    def follows(self, certificates: Certificates) -> bool:
        margin = certificates.evidence.get("margin")
        if margin is None or (certificates.norm, certificates.alpha) != (self.norm, 0.0):
            return False
        asked = torch.isin(certificates.radii, torch.tensor((0.0, *self.radii), dtype=torch.float64))
        return bool((asked & ((certificates.radii == 0) | (margin > 0))).all())

    def _proved(self, network: Network, x: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch the largest radius proved, 0 for none, and the least bound of a margin there, [B] each."""
        clean = (margin_rows(labels, network.classes).double() @ logits.double()[:, :, None]).squeeze(2)
        radii, margins = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2))
        for eps in self.radii:
            (rows,) = torch.where(radii == 0)
            if not len(rows):
                break
            ball = Ball(
                x[rows].double(), torch.full((len(rows),), eps, dtype=torch.float64, device=x.device), self.norm
            )
            least = self._least(network, ball, labels[rows], clean[rows])
            margins[rows] = least
            radii[rows[least > 0]] = eps
        return radii, margins

    def _least(self, network: Network, ball: Ball, labels: Tensor, clean: Tensor) -> Tensor:
        """[B], the smallest over the margins of the largest bound of each; finite, and not above 0 if nothing holds."""
        known = network.intervals(ball, self.arithmetic)
        best = torch.full_like(clean, -LARGEST)
        open_rows = torch.arange(len(labels), device=labels.device)
        query = Query(network, ball, labels, self.arithmetic, known)
        stages = self.bounds(query)
        for bound in stages:
            sound = bound.where(bound.isfinite(), -LARGEST)
            best[open_rows] = torch.maximum(best[open_rows], sound)
            _require_below(best[open_rows], clean[open_rows], self.arithmetic)
            left = ~(best[open_rows] > 0).all(1)
            if not bool(left.any()):
                break
            if not bool(left.all()):
                (rows,) = torch.where(left)
                open_rows = open_rows[rows]
                shrunk = query.of(rows)
                query.domain, query.labels, query.known = shrunk.domain, shrunk.labels, shrunk.known
        return best.amin(1)

    def _conditions(self, model: nn.Module) -> tuple[str, ...]:
        radii = ", ".join(f"{eps:g}" for eps in sorted(self.radii))
        about = f"on inputs in [0, 1] at distance {self.norm} up to the radius, tried at {radii}"
        if isinstance(model, Twinned):
            require(self.arithmetic == "float32", "arithmetic='real' must be 'float32' for a file that a runtime runs.")
            return (f"about the file's own answers {about}", *model.conditions())
        what = {
            "float32": "of every float32 evaluation of the model, layer by layer, with sums in any order: not in "
            "bfloat16 or TF32, with folded or quantised weights, or by transforms (Winograd, FFT)",
            "real": "of the model as a function of real numbers: rounding of its evaluation is not covered",
        }[self.arithmetic]
        return (
            f"about the model itself {about}",
            what,
            "with these weights, in eval mode: BatchNorm by running statistics, no dropout",
        )


def _require_below(bounds: Tensor, clean: Tensor, arithmetic: Arithmetic) -> None:
    """The input itself lies in its ball: no bound may lie above its own margin."""
    slack = 0.0 if arithmetic == "float32" else 1e-3 * (1 + clean.abs())
    if bool((bounds > clean + slack).any()):
        raise TrivetError(
            "a bound lies above the margin of the input itself: either the model is not evaluated as certified (TF32, "
            "convolutions by transforms), or this is a bug; please report it."
        )


def slopes_of(slopes: Sequence[Slope]) -> tuple[Slope, ...]:
    """Checked names of slopes."""
    known = ("adaptive", "zero", "one", "same")
    require(
        len(slopes) > 0 and all(each in known for each in slopes), f"slopes={list(slopes)} must be some of {known}."
    )
    return tuple(slopes)
