"""Randomized smoothing (Cohen, Rosenfeld & Kolter, ICML 2019): a certificate for any classifier, by adding noise.

The base classifier f (the model) is wrapped into g(x) = the most likely class of f(x + noise). What is certified,
and what must be deployed, is g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trivet.certify.certifier import ABSTAIN, Certificates, Certifier
from trivet.certify.compiled import compiled
from trivet.display import Advance
from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.models.inputs import require_unit_range
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits, Precision, surrogate
from trivet.randomness import generator
from trivet.statistics import binomial_lower, normal_quantile

_BLOCK = 100
"""Noise is drawn in blocks of this many copies whatever the batch size: generators do not promise that two short
draws equal one long one."""

SLACK = 1e-12
"""Taken off the probability bound: more than the errors of the special functions that compute bound and radius."""


class _Block(NamedTuple):
    """`rows` noisy copies of input `image`, whose votes go to `slot`, drawn from `source`."""

    image: int
    slot: int
    rows: int
    source: torch.Generator


@method(
    title="Randomized smoothing",
    paper="Cohen, Rosenfeld & Kolter, ICML 2019; L1: Yang, Duan et al., ICML 2020",
    year=2019,
    legs="robust",
)
@dataclass(frozen=True)
class Smoothing(Certifier):
    """CERTIFY and PREDICT of the paper; noise in pixel units, before the model's normalisation, never clipped.

    CERTIFY: `n0` noisy copies choose the class c; `n` fresh ones vote, and p = CP(votes for c; n, alpha) is the
    one-sided Clopper-Pearson lower bound of P(f(x + noise) = c). If p > 1/2,

        L2, noise N(0, sigma^2 I):            R = sigma Phi^{-1}(p)
        L1, noise U[-lam, lam]^D:             R = 2 lam (p - 1/2),   lam = sqrt(3) sigma

    (sigma is the standard deviation of each noise coordinate in both), else it abstains. With probability at least
    1 - alpha over the draw, g(x + d) = c for all ||d|| < R. Copies on which the model returns a logit that is not
    finite vote for no class, and so only ever shrink R. The largest possible radius has p = alpha^(1/n): 3.2 sigma
    for n = 10,000 and 3.8 sigma for n = 100,000 at alpha = 0.001 (L2).

    Attributes:
        sigma: standard deviation of each noise coordinate, in pixel units of [0, 1].
        n0: copies that choose the class.
        n: copies that estimate its probability; the paper's tables use 100,000.
        alpha: how likely each single certificate may be wrong.
        norm: of the certified ball.
        precision: the arithmetic of f; certificates in bf16 are about the bfloat16 network.
        batch_size: copies per forward pass, of one input or of several; multiples of 100 waste nothing.
        compile: run f through torch.compile: seconds to minutes once per network and batch size, then faster on
            most. Falls back to eager execution where the compiler fails, and says so in the conditions.
    """

    about: ClassVar[Literal["model", "smoothed"]] = "smoothed"
    sigma: float
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    norm: Literal["L2", "L1"] = "L2"
    precision: Precision = "fp32"
    batch_size: int = 400
    compile: bool = False

    def __post_init__(self) -> None:
        require(0 < self.sigma < torch.inf, f"sigma={self.sigma} must be positive and finite.")
        require(self.n0 >= 1, f"n0={self.n0} must be at least 1.")
        require(self.n >= 1, f"n={self.n} must be at least 1.")
        require(0 < self.alpha < 1, f"alpha={self.alpha} must lie strictly between 0 and 1.")
        require(self.norm in ("L2", "L1"), f"norm={self.norm!r} must be 'L2' (Gaussian noise) or 'L1' (uniform noise).")
        require(self.precision in ("fp32", "bf16"), f"precision={self.precision!r} must be 'fp32' or 'bf16'.")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")

    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """CERTIFY for each of `x` [N, ...] in [0, 1]; the evidence is `count`, the votes for the certified class.

        Input i draws its noise from generators named (seed, "smoothing", index[i], stage): the counts do not depend
        on batch size or sharding, except where the kernels of another batch size round a tie to the other side.

        Raises:
            BadValue: inputs outside [0, 1], or a model whose answer for one input depends on the rest of the batch.
        """
        index = positions(x, index)
        votes, note = self._votes(model, x, (("select", self.n0), ("estimate", self.n)), seed, index, advance)
        labels = votes[:, 0, :-1].argmax(1)
        counts = votes[:, 1].gather(1, labels[:, None]).squeeze(1)
        radii = torch.tensor([self.radius_of(count) for count in counts.tolist()], dtype=torch.float64)
        labels = labels.where(radii > 0, ABSTAIN)
        evidence = {"count": counts}
        return Certificates(index, labels, radii, self.norm, self.alpha, self.conditions(note), evidence)

    def predict(self, model: nn.Module, x: Tensor, *, seed: int, n: int = 1_000, index: Tensor | None = None) -> Tensor:
        """PREDICT: the smoothed classifier's labels [N] for `x` [N, ...], or `ABSTAIN` where `n` votes are too close.

        The label is returned if a two-sided binomial test at level `alpha` rejects that the two classes with most
        votes are equally likely; it then differs from g(x) with probability at most `alpha`. Abstains, too, where
        most copies get no finite logits.
        """
        from scipy.stats import binomtest

        require(n >= 1, f"n={n} must be at least 1.")
        votes, _ = self._votes(model, x, (("predict", n),), seed, positions(x, index), None)
        labels = []
        for row in votes[:, 0]:
            (first, second), classes = (top.tolist() for top in row.topk(2))
            certain = binomtest(first, first + second, 0.5).pvalue <= self.alpha and classes[0] != len(row) - 1
            labels.append(classes[0] if certain else ABSTAIN)
        return torch.tensor(labels, dtype=torch.int64)

    def radius(self, probability: float) -> float:
        """The certified radius where the top class has at least `probability`; 0 if that is not above one half."""
        if not probability > 0.5:
            return 0.0
        return self._scale * (normal_quantile(probability) if self.norm == "L2" else 2.0 * (probability - 0.5))

    def threshold(self, radius: float) -> float:
        """The probability of the top class above which `radius` is certified: the inverse of `radius`."""
        if self.norm == "L1":
            return 0.5 + radius / (2.0 * self._scale)
        from scipy.special import ndtr

        return float(ndtr(radius / self._scale))

    def radius_of(self, count: int) -> float:
        """The radius that `count` votes out of `n` certify with confidence 1 - alpha; 0 means abstain."""
        return self.radius(binomial_lower(count, self.n, self.alpha) - SLACK)

    def follows(self, certificates: Certificates) -> bool:
        if certificates.evidence.keys() != {"count"} or (certificates.norm, certificates.alpha) != (
            self.norm,
            self.alpha,
        ):
            return False
        possible = [self.radius_of(count) for count in certificates.evidence["count"].tolist()]
        # Special functions differ in the last digits between releases, but not in the ninth.
        return bool((certificates.radii <= (1 + 1e-9) * torch.tensor(possible, dtype=torch.float64)).all())

    def shares(self, certificates: Certificates) -> Tensor:
        return certificates.evidence["count"].double() / self.n

    @property
    def _scale(self) -> float:
        """sigma (L2) or lam (L1), as radii count it: the noise is drawn in float32, which may round it down."""
        exact = self.sigma if self.norm == "L2" else 3.0**0.5 * self.sigma
        return min(exact, float(torch.tensor(exact, dtype=torch.float32)))

    def draw(self, rows: Tensor, source: torch.Generator) -> Tensor:
        """`rows` overwritten by noise."""
        if self.norm == "L2":
            return rows.normal_(0.0, self._scale, generator=source)
        return rows.uniform_(-self._scale, self._scale, generator=source)

    @torch.no_grad()
    def _votes(
        self,
        model: nn.Module,
        x: Tensor,
        stages: Sequence[tuple[str, int]],
        seed: int,
        index: Tensor,
        advance: Advance | None,
    ) -> tuple[Tensor, str]:
        """How often each class won, [N, stages, K + 1] int64 (last: no class), and a note if compiling failed.

        The copies of all inputs and stages form one stream that is cut into full batches.
        """
        if not len(x):
            return torch.zeros(0, len(stages), 2, dtype=torch.int64), ""
        with evaluating(model):
            frozen = surrogate(model, self.precision)
            classes = require_separate_rows(frozen, x)
            clean = x.float().movedim(1, -1).contiguous()  # channels last, so that noise fills memory in order
            capacity = self.batch_size * math.ceil(_BLOCK / self.batch_size)
            batch = clean.new_zeros(capacity, *clean.shape[1:])
            f, note = compiled(frozen, batch[: self.batch_size].movedim(-1, 1)) if self.compile else (frozen, "")
            spare = len(x) * len(stages)  # where the votes of rows without an image go
            votes = torch.zeros((spare + 1) * (classes + 1), dtype=torch.int64, device=x.device)
            slots = torch.full((capacity,), spare, device=x.device)
            filled, work = 0, len(x) * sum(n for _, n in stages)

            def vote() -> None:
                """Count what f says about the rows filled so far; nothing here waits for the device."""
                rows = capacity if self.compile else filled  # a compiled f knows one shape
                slots[filled:] = spare
                noisy = batch[:rows].movedim(-1, 1)
                for part, slot in zip(noisy.split(self.batch_size), slots[:rows].split(self.batch_size), strict=True):
                    logits = f(part)
                    winners = logits.argmax(1).where(logits.isfinite().all(1), classes)
                    votes.index_add_(0, slot * (classes + 1) + winners, torch.ones_like(slot))
                if advance:
                    advance(filled * len(x) / work)

            for block in _blocks(stages, seed, index, x.device):
                if filled + block.rows > capacity:
                    vote()
                    filled = 0
                rows = slice(filled, filled + block.rows)
                self.draw(batch[rows], block.source).add_(clean[block.image])
                slots[rows] = block.slot
                filled = rows.stop
            vote()
        return votes[: spare * (classes + 1)].view(len(x), len(stages), classes + 1).cpu(), note

    def conditions(self, note: str) -> tuple[str, ...]:
        """What must hold for the certificates to be true; `note` says how compiling went."""
        noise = (
            f"N(0, {self.sigma:g}^2)" if self.norm == "L2" else f"uniform noise of standard deviation {self.sigma:g}"
        )
        arithmetic = {
            "fp32": "of the float32 evaluation of the model, BatchNorm folded into convolutions where it can be",
            "bf16": "of the bfloat16 evaluation of the model, not of its float32 evaluation",
        }[self.precision]
        how = f" ({note})" if note else ", compiled" if self.compile else ""
        return (
            f"about the smoothed classifier, the most likely label under {noise}: deploy it by sampling",
            f"each certificate is wrong with probability at most {self.alpha:g} over its {self.n0} + {self.n} draws",
            f"{arithmetic}{how}",
            "in real arithmetic: rounding where noise meets pixels is not covered (Voracek & Hein, ICLR 2023)",
        )


def positions(x: Tensor, index: Tensor | None) -> Tensor:
    """The checked positions [N] of `x` in its dataset."""
    require(x.ndim >= 2, f"inputs must be a batch [N, ...], got {tuple(x.shape)}.")
    require_unit_range(x)
    if index is None:
        return torch.arange(len(x))
    require(index.shape == (len(x),), f"index must be [{len(x)}] like the inputs, got {tuple(index.shape)}.")
    return index.cpu()


def _blocks(stages: Sequence[tuple[str, int]], seed: int, index: Tensor, device: torch.device) -> Iterator[_Block]:
    """The blocks of all inputs and stages, in order."""
    for image, position in enumerate(index.tolist()):
        for stage, (name, n) in enumerate(stages):
            source = generator(seed, "smoothing", position, name, device=device)
            for start in range(0, n, _BLOCK):
                yield _Block(image, image * len(stages) + stage, min(_BLOCK, n - start), source)


def require_separate_rows(f: Logits, x: Tensor) -> int:
    """The number of classes; refuses models that couple the rows of a batch, whose votes are not independent."""
    first = x[:1].float()
    pairs = [torch.cat([first, torch.full_like(first, value)]) for value in (0.0, 0.0, 1.0)]
    logits, again, other = (f(pair) for pair in pairs)
    require(logits.ndim == 2 and len(logits) == 2, f"the model must return logits [B, K], got {tuple(logits.shape)}.")
    deterministic = torch.equal(logits, again)  # of a model with noise of its own nothing can be told here
    if deterministic and not torch.allclose(logits[0], other[0], rtol=1e-5, atol=1e-5 * float(logits.abs().max())):
        raise BadValue(
            "the model's answer for one input depends on the other inputs of its batch (batch statistics in eval "
            "mode?), so noisy copies would not vote independently; give BatchNorm running statistics."
        )
    return logits.shape[1]
