"""The heterogeneous Gaussian mechanism of SecureSGD (Phan, Vu, Liu, Jin, Dou, Wu & Thai, IJCAI 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.models.gaussian_mechanism import analytic_multiplier, heterogeneous_multiplier
from trivet.models.modes import evaluating
from trivet.models.noise_layer import NoiseLayer, NoisyNetwork
from trivet.models.pixeldp import CHANNELS, noisy_cnn
from trivet.models.sensitivity import Norm

_FLOOR = 0.1


@method(
    title="Heterogeneous noise CNN (SecureSGD)",
    paper="Phan et al., IJCAI 2019",
    year=2019,
    legs="robust private",
    note="sound form: fresh noise, exact sensitivity; private only by the rule that trains it",
)
def heterogeneous_noise_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    attack_norm: Norm = "L2",
    attack_size: float = 0.1,
    epsilon: float = 1.0,
    delta: float = 0.05,
    redistribution: Sequence[float] | None = None,
    calibration: Literal["heterogeneous", "analytic"] = "heterogeneous",
    hidden: int = 1024,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> NoisyNetwork:
    """The network of `pixeldp_cnn` whose noise has a scale of its own on each channel k of the first convolution.

    Channel k gets N(0, (s r_k)^2), r the redistribution, and the kernel W is divided by its sensitivity in units of
    that noise, D = sup ||diag(1/r) W d||_2 over ||d|| <= 1, so that the layer is (`epsilon`, `delta`)-
    indistinguishable between inputs that are `attack_size` = L apart, for any epsilon > 0:

        heterogeneous:  s = L (sqrt(t) + sqrt(t + epsilon)) / (sqrt(2) epsilon),   t = ln(sqrt(2 / pi) / delta)
        analytic:       the smallest s that is enough (Balle & Wang, ICML 2018): SecureSGD-AGM

    Three departures from the released code make it sound. Its D = ||W||_2 / sqrt(||r||_2) bounds nothing: with r = 1
    on n units it is smaller than the true ||W||_2 by n^(1/4), and it stays finite for a channel without noise. Its
    noise is drawn once and kept; here every pass draws anew. Its r is learned from the training records without
    paying for it; here r comes from outside: uniform if None (data-independent), or what `redistribution_of` finds on
    public records. Train by the rule `dp_sgd`, whose accountant then covers all that touches the private records; the
    published loop clips the batch's mean gradient, which bounds no record's share.

    Args:
        attack_norm, attack_size, epsilon, delta, hidden: as in `pixeldp_cnn`.
        redistribution: 32 positive numbers, rescaled to the mean 1; must not depend on private records.
        calibration: which bound sets the noise.

    Raises:
        BadValue: settings out of range.
    """
    require(0 < attack_size < torch.inf, f"attack_size={attack_size} must be positive and finite.")
    require(epsilon > 0, f"epsilon={epsilon} must be positive.")
    given = [1.0] * CHANNELS if redistribution is None else list(redistribution)
    require(
        len(given) == CHANNELS and all(0 < each < math.inf for each in given),
        f"redistribution={given} must be {CHANNELS} positive numbers: without noise a channel protects nothing.",
    )
    shares = torch.tensor(given) * (CHANNELS / sum(given))
    multiplier = (analytic_multiplier if calibration == "analytic" else heterogeneous_multiplier)(epsilon, delta)
    noise = NoiseLayer("gaussian", (attack_size * multiplier * shares).view(-1, 1, 1))
    name = "heterogeneous_noise_cnn"
    return noisy_cnn(input_shape, num_classes, noise, shares, attack_norm, hidden, mean, std, generator, name)


def redistribution_of(model: NoisyNetwork, inputs: Tensor, labels: Tensor) -> list[float]:
    """r_k = |mean of sign(dLoss / dh_k)| over records and positions, the paper's rule, rescaled to the mean 1.

    The records [B, C, H, W] with labels [B] must be public: r is a statistic of them that no noise covers. `model` is
    to be warmed up on public records, too, or privately. Channels below a tenth of the mean are raised to it: a
    vanishing r_k would let the sensitivity in its unit grow without bound.
    """
    require(len(inputs) >= 1, "redistribution_of needs at least one public record.")
    with evaluating(model), torch.enable_grad():
        h = model.before(inputs).detach().requires_grad_()
        loss = F.cross_entropy(model.after(model.noise(h)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, h)
    r = gradient.sign().transpose(0, 1).flatten(1).mean(1).abs().double()
    r = torch.ones_like(r) if not bool(r.any()) else r / r.mean()
    r = r.clamp_min(_FLOOR)
    return (r / r.mean()).tolist()
