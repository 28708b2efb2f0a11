"""The radius of two Laplace noises against exact integration, and the published sum that it replaces."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import laplace
from torch import nn

from trivet.certify.laplace_chain import laplace_radius, latent_l1
from trivet.errors import BadValue

SCALAR: dict[str, float] = {
    "input_sensitivity": 1.0,
    "input_scale": 1.0,
    "latent_sensitivity": 1.0,
    "latent_scale": 1.0,
}


def both_positive(x: float) -> float:
    """P(x + Lap(1) > 0) P(x + Lap(1) > 0), integrating the densities."""
    one, _ = quad(lambda t: math.exp(-abs(t)) / 2, -x, 0 if x > 0 else np.inf)
    return (one + 0.5) ** 2 if x > 0 else one**2


def test_two_releases_of_a_number_refute_the_sum_of_reaches_and_confirm_the_sum_of_eps() -> None:
    p = both_positive(3.0)
    assert p == pytest.approx(0.950833, abs=1e-6)
    reach = math.log(p / (1 - p)) / 2
    assert reach == pytest.approx(1.481054, abs=1e-6)
    claimed = reach / 1 + reach / 1  # kappa + phi
    falls = brentq(lambda shift: both_positive(3.0 - shift) - 0.5, 0, 3)
    assert falls == pytest.approx(2.4652, abs=1e-4)
    assert claimed == pytest.approx(2.962, abs=1e-3)
    assert claimed > 2.5 > falls
    sound = laplace_radius(p, 1 - p, **SCALAR, passes="two")  # type: ignore[arg-type]
    assert 0.74 < sound == pytest.approx(0.7405, abs=1e-4)
    assert both_positive(3.0 - sound) > 0.5
    # either noise alone, as if the chain were serial, would claim twice as much: still true here
    assert laplace_radius(p, 1 - p, **SCALAR, passes="serial") == pytest.approx(2 * sound)  # type: ignore[arg-type]


def _positive(x: float, w: float, b_x: float, b_h: float) -> float:
    """P(w (x + n) + m > 0), n of scale b_x and m of scale b_h."""

    def density(n: float) -> float:
        return float(laplace.pdf(n, scale=b_x) * laplace.cdf(w * (x + n), scale=b_h))

    return float(quad(density, -40 * b_x, 40 * b_x, points=(-x, 0.0))[0])


def test_the_serial_radius_holds_for_a_chain_integrated_exactly() -> None:
    """The class turns at x = 0, and never within the radius."""
    for x, w, b_x, b_h in [(1.0, 1.0, 0.5, 0.5), (0.4, 2.0, 0.1, 1.0), (2.0, 0.5, 1.5, 0.2), (1.0, 3.0, 2.0, 0.3)]:
        p = _positive(x, w, b_x, b_h)
        radius = laplace_radius(
            p,
            1 - p,
            input_sensitivity=1.0,
            input_scale=b_x,
            latent_sensitivity=w,
            latent_scale=b_h,
            passes="serial",
        )
        assert 0 < radius <= x


def test_without_noise_in_one_place_the_other_alone_counts() -> None:
    alone = 0.3 * math.log(0.8 / 0.1) / 2 / 5
    base = {"input_sensitivity": 5.0, "input_scale": 0.3, "latent_sensitivity": 7.0}
    # a latent release that tells nothing leaves PixelDP's radius; a serial chain without latent noise, too
    assert laplace_radius(0.8, 0.1, **base, latent_scale=math.inf, passes="two") == pytest.approx(alone)
    assert laplace_radius(0.8, 0.1, **base, latent_scale=0.0, passes="serial") == pytest.approx(alone)
    assert laplace_radius(0.8, 0.1, **base, latent_scale=0.0, passes="two") == 0


@pytest.mark.parametrize("passes", ["two", "serial"])
def test_scales_stretch_the_radius_and_equal_scores_end_it(passes: Any) -> None:
    base = {"input_sensitivity": 3.0, "latent_sensitivity": 2.0}
    once = laplace_radius(0.7, 0.2, **base, input_scale=0.5, latent_scale=0.25, passes=passes)
    twice = laplace_radius(0.7, 0.2, **base, input_scale=1.0, latent_scale=0.5, passes=passes)
    assert twice == pytest.approx(2 * once)
    assert laplace_radius(0.4, 0.4, **base, input_scale=0.5, latent_scale=0.25, passes=passes) == 0
    eps = [once * 3.0 / 0.5, once * 2.0 / 0.25]
    spent = sum(eps) if passes == "two" else min(eps)
    assert pytest.approx(math.exp(2 * spent) * 0.2) == 0.7


def test_serial_certifies_at_least_as_far_as_the_input_alone_and_that_as_two_passes() -> None:
    base = {"input_sensitivity": 64.0, "input_scale": 1.0, "latent_sensitivity": 40.0, "latent_scale": 1.0}
    serial = laplace_radius(0.9, 0.02, **base, passes="serial")
    alone = laplace_radius(0.9, 0.02, **base | {"latent_scale": math.inf}, passes="two")
    assert serial >= alone >= laplace_radius(0.9, 0.02, **base, passes="two") > 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, 5, padding=2, groups=2),
        nn.Sequential(nn.Flatten(), nn.Linear(72, 5)),
    ],
)
def test_latent_sensitivities_are_those_of_the_matrix(layer: nn.Module) -> None:
    layer = layer.double()
    unit = torch.eye(72, dtype=torch.float64).view(72, 2, 6, 6)
    matrix = (layer(unit) - layer(torch.zeros_like(unit[:1]))).flatten(1).detach().T
    bare: Any = layer[1] if isinstance(layer, nn.Sequential) else layer
    shape = (72,) if isinstance(bare, nn.Linear) else (2, 6, 6)
    assert latent_l1(bare, shape, "Linf") == pytest.approx(float(matrix.abs().sum()), rel=1e-8)
    if getattr(bare, "groups", 1) == 1:
        assert latent_l1(bare, shape, "L1") == pytest.approx(float(matrix.abs().sum(0).max()), rel=1e-8)
    x, change = torch.rand(2, 2, 6, 6, dtype=torch.float64)[:, None]
    moved = float((layer(x + change) - layer(x)).detach().abs().sum())
    assert moved <= float(change.abs().max()) * latent_l1(bare, shape, "Linf")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"input_scale": -1.0}, "input_scale=-1.0"),
        ({"latent_scale": math.nan}, "latent_scale=nan"),
        ({"latent_sensitivity": math.inf}, "latent_sensitivity=inf"),
        ({"passes": "one"}, "passes='one'"),
    ],
)
def test_impossible_chains_are_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        laplace_radius(0.9, 0.1, **(SCALAR | {"passes": "two"} | wrong))
