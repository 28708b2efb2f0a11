"""The certificate of networks with Laplace noise on input and first layer: what StoBatch's radius should have been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trivet.certify.certifier import ABSTAIN, Certificates, Certifier
from trivet.certify.laplace_chain import laplace_radius, latent_l1
from trivet.certify.smoothing import positions, require_separate_rows
from trivet.display import Advance
from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.models.modes import evaluating
from trivet.models.noise_layer import NoiseLayer
from trivet.models.normalize import Normalize
from trivet.models.twice_noised import TwiceNoised
from trivet.randomness import generator
from trivet.statistics import binomial_lower, binomial_upper

_BLOCK = 100  # copies that draw their noise together, whatever the batch size


@method(title="Twice-noised certificate", name="twice_noised", legs="robust")
@dataclass(frozen=True)
class TwiceNoisedCertificate(Certifier):
    """The most frequent answer of a `TwiceNoised` network is constant on a ball: either noise hides small changes.

    For each input, `n` passes with fresh noise of the network's own scales; p is a lower bound on the rate of the
    most frequent class, q the largest upper bound of the others, all 2K Clopper-Pearson bounds at alpha / 2K, so that
    they hold at once with probability 1 - alpha and the same draws may choose and bound. Then

        R = ln(p / q) / (2 min(S_x / b_x, S_h / b_h))

    with S_x = d for l_inf, 1 for l_1, and S_h a bound on how far the first layer moves in l_1, from its weights, in
    float64. See `laplace_chain` for why the two reaches must not be added, as was published.

    Attributes:
        norm: of the ball.
        n: passes per input.
        alpha: how likely each single certificate may be wrong.
        batch_size: passes computed together.
    """

    about: ClassVar[Literal["model", "smoothed"]] = "smoothed"
    norm: Literal["Linf", "L1"] = "Linf"
    n: int = 1_000
    alpha: float = 0.001
    batch_size: int = 500

    def __post_init__(self) -> None:
        require(self.norm in ("Linf", "L1"), f"norm={self.norm!r} must be 'Linf' or 'L1'.")
        require(self.n >= 2, f"n={self.n} must be at least 2.")
        require(0 < self.alpha < 1, f"alpha={self.alpha} must lie strictly between 0 and 1.")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")

    @torch.no_grad()
    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """Certificates for `x` [N, C, H, W]; the evidence is `lower` and `upper` (p and q), and both rates S / b.

        Input i draws its noise from the generator named (seed, "twice noised", index[i]).

        Raises:
            BadValue: inputs outside [0, 1], or a model whose noise is not the noise of the bound.
        """
        index = positions(x, index)
        network = _twice_noised(model)
        rates = self._rates(network, tuple(x.shape[1:]))
        lower, upper, labels = (torch.zeros(len(x), dtype=torch.float64) for _ in range(3))
        with evaluating(network):
            if len(x):
                require_separate_rows(network.after, network.latent(x[:1].float()))
            for row, position in enumerate(index.tolist()):
                source = generator(seed, "twice noised", position, device=x.device)
                labels[row], lower[row], upper[row] = self._bounds(self._votes(network, x[row].float(), source))
                if advance:
                    advance(1)
        radii = [self._radius(p, q, *rates) for p, q in zip(lower.tolist(), upper.tolist(), strict=True)]
        named = labels.long().where(lower > upper, ABSTAIN)
        evidence = {"lower": lower, "upper": upper}
        evidence |= {f"{name}_rate": torch.full_like(lower, rate) for name, rate in zip(_PLACES, rates, strict=True)}
        conditions = (
            "about the most frequent label over fresh draws of the model's own Laplace noise: deploy it by sampling, "
            "with noise drawn anew in every pass and of the same scales",
            f"inputs 1 apart in {self.norm} move the input by {rates[0]:.6g} and the first layer by at most "
            f"{rates[1]:.6g} scales of their noise; the smaller counts",
            f"each certificate is wrong with probability at most {self.alpha:g} over its {self.n} draws, by "
            "simultaneous bounds on all classes, so the draws that choose the label may bound it",
            "in real arithmetic: rounding where noise meets activations, and the cut tails of generators, are not "
            "covered",
        )
        return Certificates(
            index, named, torch.tensor(radii, dtype=torch.float64), self.norm, self.alpha, conditions, evidence
        )

    def follows(self, certificates: Certificates) -> bool:
        evidence, names = certificates.evidence, ("lower", "upper", *(f"{name}_rate" for name in _PLACES))
        if evidence.keys() != set(names) or (certificates.norm, certificates.alpha) != (self.norm, self.alpha):
            return False
        rows = zip(*(evidence[name].tolist() for name in names), strict=True)
        possible = torch.tensor([self._radius(*row) for row in rows], dtype=torch.float64)
        # Special functions differ in the last digits between releases, but not in the ninth.
        return bool((certificates.radii <= (1 + 1e-9) * possible).all())

    def _rates(self, network: TwiceNoised, shape: tuple[int, ...]) -> tuple[float, float]:
        """S_x / b_x and S_h / b_h."""
        size = float(torch.Size(shape).numel()) if self.norm == "Linf" else 1.0
        stretch = 1.0
        if isinstance(network.normalize, Normalize):
            stretch = 1 / float(network.normalize.std.double().min())
        elif not isinstance(network.normalize, nn.Identity):
            raise BadValue(f"normalize={network.normalize!r} is no layer whose stretch is known; use mean and std.")
        latent = latent_l1(network.first, shape, self.norm) * stretch
        require(latent > 0, "the first layer has no weights, so that the network does not look at its input.")
        return size / float(network.input_noise.scales), latent / float(network.latent_noise.scales)

    @staticmethod
    def _radius(lower: float, upper: float, input_rate: float, latent_rate: float) -> float:
        return laplace_radius(
            lower,
            upper,
            input_sensitivity=input_rate,
            input_scale=1.0,
            latent_sensitivity=latent_rate,
            latent_scale=1.0,
            passes="serial",
        )

    def _votes(self, network: TwiceNoised, x: Tensor, source: torch.Generator) -> list[int]:
        """How many of n passes are for each class; a pass without finite logits is for none."""
        votes: list[Tensor] = []
        latent = network.latent(x[None])[0]
        blocks = [min(_BLOCK, self.n - start) for start in range(0, self.n, _BLOCK)]
        together = max(1, self.batch_size // _BLOCK)
        for start in range(0, len(blocks), together):
            inputs, latents = [], []
            for rows in blocks[start : start + together]:
                copies = x.expand(rows, *x.shape)
                inputs.append(copies + network.input_noise.draw(copies, source))
                latents.append(network.latent_noise.draw(latent.expand(rows, *latent.shape), source))
            logits = network.after(network.latent(torch.cat(inputs)) + torch.cat(latents))
            answers = nn.functional.one_hot(logits.argmax(1), logits.shape[1])
            votes.append(answers[logits.isfinite().all(1)].sum(0))
        counted: list[int] = torch.stack(votes).sum(0).tolist()
        return counted

    def _bounds(self, votes: list[int]) -> tuple[int, float, float]:
        """The most frequent class, the lower bound of its rate and the largest upper bound of the others."""
        top = votes.index(max(votes))
        tail = self.alpha / (2 * len(votes))
        lower = binomial_lower(votes[top], self.n, tail)
        upper = binomial_upper(max(votes[:top] + votes[top + 1 :]), self.n, tail)
        # No more than what the top class leaves, and never zero.
        return top, lower, max(min(upper, 1 - lower), 1e-12)


_PLACES = ("input", "latent")


def _twice_noised(model: nn.Module) -> TwiceNoised:
    """The model, if its test noise is the noise of the bound; all others are refused."""
    if type(model) is not TwiceNoised:
        raise BadValue(
            f"a {type(model).__name__} is no network with noise on input and first layer; train a twice_noised_mlp or "
            "twice_noised_cnn, or certify by smoothing."
        )
    for noise in (model.input_noise, model.latent_noise):
        hooks = [*noise._forward_hooks.values(), *noise._forward_pre_hooks.values()]
        require(
            type(noise) is NoiseLayer and noise.law == "laplace" and not hooks and "forward" not in vars(noise),
            f"a noise layer is a changed one ({type(noise).__name__}): frozen, shrunk, shared or other noise is not "
            "the noise of the bound; use NoiseLayer as it is.",
        )
        noise.require_noise()
        require(noise.scales.ndim == 0, "scales must be one number for each layer of Laplace noise.")
    return model
