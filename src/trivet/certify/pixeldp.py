"""The certificate of PixelDP (Lecuyer et al., IEEE S&P 2019), for networks with fresh noise inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trivet.certify.certifier import ABSTAIN, Certificates, Certifier
from trivet.certify.divergence_radius import Bound, gaussian_reach, laplace_reach
from trivet.certify.smoothing import positions, require_separate_rows
from trivet.display import Advance
from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.models.modes import evaluating
from trivet.models.noise_layer import NoiseLayer, NoisyNetwork
from trivet.models.sensitivity import sensitivity
from trivet.randomness import generator
from trivet.statistics import binomial_lower, binomial_upper

_BLOCK = 100
"""Noise is drawn in blocks of this many copies whatever the batch size: two short draws need not equal a long one."""

_SLACK = 1e-12
"""Taken off the bounds: more than the errors of the special functions that compute them."""


@method(title="PixelDP certificate", name="pixeldp", paper="Lecuyer et al., IEEE S&P 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class PixelDP(Certifier):
    """The average answer of a `NoisyNetwork` is constant on a ball, because its noisy layer hides small changes.

    For each input, `n` passes with fresh noise of the network's own scales give bounds on the score of every class,
    lower and upper, each at alpha / 2K: all 2K hold at once with probability 1 - alpha. Therefore the same draws may
    choose the class and bound it: no selection has to be paid for (n0 is not needed). With p the lower bound of the
    top class, q the largest upper bound of the others, never more than 1 - p, and u the bound on how far the noisy
    layer moves per unit of input, in scales of its noise (from the weights the model has now, in float64):

        Laplace:   R = ln(p / q) / (2 u)
        Gaussian:  R = max over delta in {0.001, …, 0.299}, eps in (0, 1] with p >= e^(2 eps) q + (1 + e^eps) delta
                       of eps / (u sqrt(2 ln(1.25 / delta)))

    which is the paper's L (eps / eps0) sqrt(ln(1.25 / delta0) / ln(1.25 / delta)) for noise of that construction.
    Sound, and loose: randomized smoothing certifies 2 to 5 times as far at the same noise.

    Attributes:
        norm: of the ball: "L2" or "L1" for Gaussian, "L1" for Laplace noise.
        n: passes per input.
        alpha: how likely each single certificate may be wrong; 0.05 as published.
        scores: "counts": a pass votes for its largest logit, Clopper-Pearson bounds. "softmax": the passes' softmax
            is averaged, empirical Bernstein bounds (Maurer & Pontil 2009), or Hoeffding's where n is too small for
            the former to pay, which n and K alone decide.
        bound: on the Gaussian mechanism: "classical" is PixelDP's; "heterogeneous" (SecureSGD's) and "analytic"
            (SecureSGD-AGM's) hold for every eps and reach farther.
        batch_size: passes computed together.
    """

    about: ClassVar[Literal["model", "smoothed"]] = "smoothed"
    norm: Literal["L2", "L1"] = "L2"
    n: int = 1_000
    alpha: float = 0.05
    scores: Literal["counts", "softmax"] = "counts"
    bound: Bound = "classical"
    batch_size: int = 500

    def __post_init__(self) -> None:
        require(self.norm in ("L2", "L1"), f"norm={self.norm!r} must be 'L2' or 'L1'.")
        require(self.n >= 2, f"n={self.n} must be at least 2.")
        require(0 < self.alpha < 1, f"alpha={self.alpha} must lie strictly between 0 and 1.")
        require(self.scores in ("counts", "softmax"), f"scores={self.scores!r} must be 'counts' or 'softmax'.")
        require(
            self.bound in ("classical", "heterogeneous", "analytic"),
            f"bound={self.bound!r} must be 'classical', 'heterogeneous' or 'analytic'.",
        )
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")

    @torch.no_grad()
    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """Certificates for `x` [N, ...]; the evidence is `lower` and `upper` (p and q) and `moves` (u).

        Input i draws its noise from the generator named (seed, "pixeldp", index[i]).

        Raises:
            BadValue: inputs outside [0, 1], or a model whose noise is not the noise of the bound.
        """
        index = positions(x, index)
        moves = self.moves(model)
        model = _noisy(model)
        noise = model.noise
        lower, upper, labels = (torch.zeros(len(x), dtype=torch.float64) for _ in range(3))
        with evaluating(model):
            released = model.before(x.float())
            if len(x):
                require_separate_rows(model.after, released)
            for row, position in enumerate(index.tolist()):
                source = generator(seed, "pixeldp", position, device=x.device)
                found = self._bounds(*self._sample(model.after, noise, released[row], source))
                labels[row], lower[row], upper[row] = found
                if advance:
                    advance(1)
        radii = [self.radius(p, q, moves, noise.law) for p, q in zip(lower.tolist(), upper.tolist(), strict=True)]
        named = labels.long().where(lower > upper, ABSTAIN)
        evidence = {"lower": lower, "upper": upper, "moves": torch.full_like(lower, moves)}
        evidence["laplace"] = torch.full_like(named, int(noise.law == "laplace"))
        return Certificates(
            index,
            named,
            torch.tensor(radii, dtype=torch.float64),
            self.norm,
            self.alpha,
            self._conditions(noise, moves),
            evidence,
        )

    def moves(self, model: nn.Module) -> float:
        """u: how far the noisy layer of `model` moves, at most, in scales of its noise, per unit of input."""
        model = _noisy(model)
        noise = model.noise
        require(
            noise.law == "gaussian" or self.norm == "L1",
            f"norm={self.norm!r} cannot be certified by Laplace noise, which hides changes in L1; set norm to L1.",
        )
        return sensitivity(model.before, self.norm, "L1" if noise.law == "laplace" else "L2", noise.scales)

    def radius(self, lower: float, upper: float, moves: float, law: str = "gaussian") -> float:
        """The certified radius where the top score is at least `lower`, and every other at most `upper`."""
        if moves <= 0:
            raise BadValue(f"moves={moves} must be positive: the first layer does not look at its input.")
        return (laplace_reach(lower, upper) if law == "laplace" else gaussian_reach(lower, upper, self.bound)) / moves

    def follows(self, certificates: Certificates) -> bool:
        evidence = certificates.evidence
        if evidence.keys() != {"lower", "upper", "moves", "laplace"} or (certificates.norm, certificates.alpha) != (
            self.norm,
            self.alpha,
        ):
            return False
        rows = zip(*(evidence[name].tolist() for name in ("lower", "upper", "moves", "laplace")), strict=True)
        possible = [self.radius(p, q, u, "laplace" if law else "gaussian") for p, q, u, law in rows]
        # Special functions differ in the last digits between releases, but not in the ninth.
        return bool((certificates.radii <= (1 + 1e-9) * torch.tensor(possible, dtype=torch.float64)).all())

    def _sample(
        self, after: nn.Module, noise: NoiseLayer, released: Tensor, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The sums [K] over n passes of each class's score and of its square, float64; never more than 1 in a pass."""
        totals: list[Tensor] = []
        blocks = [min(_BLOCK, self.n - start) for start in range(0, self.n, _BLOCK)]
        together = max(1, self.batch_size // _BLOCK)
        for start in range(0, len(blocks), together):
            like = [released.expand(rows, *released.shape) for rows in blocks[start : start + together]]
            logits = after(torch.cat([each + noise.draw(each, source) for each in like]))
            if self.scores == "counts":
                scores = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()
            else:
                scores = logits.double().softmax(1)
            # A pass without finite logits is for no class, and so only ever shrinks the radius.
            scores = scores.where(logits.isfinite().all(1, keepdim=True), 0.0)
            totals.append(torch.stack([scores.sum(0), scores.square().sum(0)]))
        first, second = torch.stack(totals).sum(0).cpu()
        return first, second

    def _bounds(self, first: Tensor, second: Tensor) -> tuple[int, float, float]:
        """The top class, the lower bound of its score and the largest upper bound of the others."""
        top, n, classes = int(first.argmax()), self.n, len(first)
        tail = self.alpha / (2 * classes)
        others = [k for k in range(classes) if k != top]
        if self.scores == "counts":
            counts = first.round().long().tolist()
            lower = binomial_lower(counts[top], n, tail)
            upper = binomial_upper(max(counts[k] for k in others), n, tail)
        else:
            mean, margin = first / n, self._margin(first, second, tail)
            lower, upper = float(mean[top] - margin[top]), float((mean + margin)[others].max())
        lower = max(0.0, lower - _SLACK)
        return top, lower, max(min(upper + _SLACK, 1 - lower), _SLACK)

    def _margin(self, first: Tensor, second: Tensor, tail: float) -> Tensor:
        """How far each mean [K] can lie from its expectation, to one side, but for probability `tail`."""
        n, log = self.n, math.log(2 / tail)
        rest = 7 * log / (3 * (n - 1))
        if rest > 0.025:  # decided without looking at the data, as it must be
            return torch.full_like(first, math.sqrt(math.log(1 / tail) / (2 * n)))
        variance = ((second - first.square() / n) / (n - 1)).clamp_min(0)
        return (2 * variance * log / n).sqrt() + rest

    def _conditions(self, noise: NoiseLayer, moves: float) -> tuple[str, ...]:
        answer = "most frequent label" if self.scores == "counts" else "largest average softmax"
        used = f", {self.bound} bound" if noise.law == "gaussian" else ""
        return (
            f"about the {answer} over fresh draws of the model's own {noise.law} noise: deploy it by sampling, with "
            "noise drawn anew in every pass and of the same scales",
            f"up to the noise, inputs 1 apart in {self.norm} move by at most {moves:.6g} scales of the noise{used}",
            f"each certificate is wrong with probability at most {self.alpha:g} over its {self.n} draws, by "
            "simultaneous bounds on all classes, so the draws that choose the label may bound it",
            "in real arithmetic: rounding where noise meets activations, and the cut tails of generators, are not "
            "covered",
        )


def _noisy(model: nn.Module) -> NoisyNetwork:
    """The model, if its test noise is the noise of the bound; all others are refused."""
    if not isinstance(model, NoisyNetwork) or type(model) is not NoisyNetwork:
        raise BadValue(
            f"a {type(model).__name__} has no noise layer behind layers of known sensitivity; train a pixeldp_cnn or "
            "a heterogeneous_noise_cnn, or certify by smoothing."
        )
    noise = model.noise
    hooks = [*noise._forward_hooks.values(), *noise._forward_pre_hooks.values()]
    require(
        type(noise) is NoiseLayer and not hooks and "forward" not in vars(noise),
        f"the noise layer is a changed one ({type(noise).__name__}): frozen, shrunk or shared noise is not the noise "
        "of the bound; use NoiseLayer as it is.",
    )
    noise.require_noise()
    return model
