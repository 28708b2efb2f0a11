"""Bounds that hold for numbers as computers add them: against exact fractions, and float32 sums in every order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from bound_oracles import ball, exact_intervals, exactly, images, in_float32, margins_of, mlp, points_in, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.certify.bounds.interval import Ball, Box
from trivet.certify.bounds.network import Network, margin_rows
from trivet.certify.bounds.rounding import Rounding, gamma
from trivet.certify.ibp import Ibp

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")


def least_margin(model: nn.Sequential, x: Tensor, eps: Fraction, row: Tensor) -> Fraction:
    """Of a linear network, exactly: min of <row, logits> over the ball within [0, 1]."""
    (layer,) = (each for each in model if isinstance(each, nn.Linear))
    weights, biases = layer.weight.double().tolist(), layer.bias.double().tolist()
    signs = [Fraction(v) for v in row.double().tolist()]
    total = sum((s * Fraction(b) for s, b in zip(signs, biases, strict=True)), Fraction(0))
    for i, value in enumerate(x.double().tolist()):
        slope = sum((s * Fraction(w[i]) for s, w in zip(signs, weights, strict=True)), Fraction(0))
        low, high = max(Fraction(value) - eps, Fraction(0)), min(Fraction(value) + eps, Fraction(1))
        total += slope * (low if slope > 0 else high)
    return total


@pytest.mark.parametrize("eps", [2.0**-7, 0.01, 0.1])
def test_intervals_contain_the_exact_ones_and_hardly_more(eps: float) -> None:
    for seed in range(8):
        model, x = mlp(6, 8, 8, 3, seed=seed), images(1, 6, seed=seed)
        found = Network.of(model, (6,)).intervals(ball(x.double(), eps), "real")
        for ours, exact in zip(found, exact_intervals(model, x, Fraction(eps)), strict=True):
            for low, high, (least, most) in zip(ours.lower[0].tolist(), ours.upper[0].tolist(), exact, strict=True):
                assert Fraction(low) <= least <= most <= Fraction(high)
                assert high - low <= float(most - least) * (1 + 1e-9) + 1e-11


def test_without_error_terms_some_interval_leaves_the_exact_one() -> None:
    """The oracle sees roundings: it would notice if the error terms were missing."""
    outside = 0
    for seed in range(8):
        model, x = mlp(6, 8, 8, 3, seed=seed), images(1, 6, seed=seed)
        found = Network.of(model, (6,)).intervals(ball(x, 2.0**-7))
        exact = exact_intervals(model, x, Fraction(2.0**-7))[-1]
        outside += sum(
            Fraction(low) > least or Fraction(high) < most
            for low, high, (least, most) in zip(
                found[-1].lower[0].tolist(), found[-1].upper[0].tolist(), exact, strict=True
            )
        )
    assert outside > 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(1e-6, 0.5), st.sampled_from(METHODS))
def test_the_bound_of_a_linear_network_is_never_above_its_exact_margin(seed: int, eps: float, method: str) -> None:
    """Tight everywhere: any rounding upwards would show."""
    model, x = mlp(5, 3, seed=seed), images(1, 5, seed=seed)
    rows = rows_of(model, x)
    for arithmetic, near in (("real", 1e-12), ("float32", 1e-5)):
        network = Network.of(model, (5,))
        found = network.margins(ball(x.double(), eps), rows, method=method, arithmetic=arithmetic)  # type: ignore[arg-type]
        for s in range(2):
            exact = least_margin(model, x[0], Fraction(eps), rows[0, s])
            assert Fraction(float(found[0, s])) <= exact
            assert float(exact) - float(found[0, s]) <= near * 10


def test_every_order_of_float32_sums_stays_above_the_bound() -> None:
    """At the input where a linear network attains its minimum, and all around in networks with rectifiers."""
    rng = np.random.default_rng(0)
    closest = math.inf
    for seed in range(6):
        for widths in ((30, 2), (12, 40, 2)):
            model, x, eps = mlp(*widths, seed=seed), images(1, widths[0], seed=seed), 0.01
            rows = rows_of(model, x)[0].numpy()
            bound = margins_of(model, x, eps, "crown", arithmetic="float32")[0].numpy()
            exact = margins_of(model, x, eps, "crown", arithmetic="real")[0].numpy()
            gradient = torch.autograd.functional.jacobian(lambda v, m=model: m(v[None])[0], x[0]).numpy()
            corner = np.clip(x[0].numpy() - np.float32(eps * (1 - 1e-6)) * np.sign(rows @ gradient)[0], 0, 1)
            for point in [corner, *points_in(x, eps, "Linf", 10, seed)[:, 0].numpy()]:
                for _ in range(20):
                    logits = in_float32(model, point, lambda n: rng.permutation(n))
                    margins = rows @ logits.astype(np.float64)
                    assert (margins >= bound).all()
                    closest = min(closest, float((margins - exact).min()))
    assert closest < 1e-4  # some of these points lie at the very edge


def test_cancelling_sums_break_bounds_for_real_numbers_and_not_those_for_float32() -> None:
    """1e8 x - 1e8 x + x: what a network loses in float32 may exceed its margin."""
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e8, 1.0, -1e8], [0.0, 0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([-0.4, 0.0]))
    x = torch.full((1, 3), 0.7)
    rows = margin_rows(torch.tensor([0]), 2)
    real, sound = (
        float(Network.of(model, (3,)).margins(ball(x, 0.0), rows, method="ibp", arithmetic=arithmetic)[0, 0])  # type: ignore[arg-type]
        for arithmetic in ("real", "float32")
    )
    evaluated = [in_float32(model, x[0].numpy(), lambda _, o=order: np.array(o)) for order in ((0, 2, 1), (0, 1, 2))]
    margins = [float(logits[0] - logits[1]) for logits in evaluated]
    assert min(margins) < 0 < real  # one order of summation flips the answer
    assert sound <= min(margins)
    assert Ibp(eps=1e-9).certify(model, x).radii.tolist() == [0.0]


def test_no_adversarial_float_is_found_by_rounding_within_a_certified_radius() -> None:
    """The attack of Jin, Ohrimenko & Rubinstein (2022) on linear classifiers, at the largest radius certified."""
    draw, flips_without = np.random.default_rng(1), 0
    for seed in range(15):
        model, x = mlp(20, 2, seed=seed), images(1, 20, seed=seed)
        with torch.no_grad():
            model[0].bias.zero_()
            label = int(model(x).argmax(1))
        row = margin_rows(torch.tensor([label]), 2)
        network = Network.of(model, (20,))

        def certified(
            eps: float, arithmetic: str | None, network: Network = network, x: Tensor = x, row: Tensor = row
        ) -> bool:
            domain = ball(x.double() if arithmetic else x, eps)
            return bool((network.margins(domain, row, method="ibp", arithmetic=arithmetic) > 0).all())  # type: ignore[arg-type]

        low = {}
        for arithmetic in ("float32", None):
            bottom, top = 0.0, 1.0
            for _ in range(60):
                middle = (bottom + top) / 2
                bottom, top = (middle, top) if certified(middle, arithmetic) else (bottom, middle)
            low[arithmetic] = bottom
        slope = (row[0, 0] @ model[0].weight.detach()).double().numpy()
        for arithmetic, radius in low.items():
            allowed, flipped = Fraction(radius), False
            inputs = x[0].numpy()
            target = np.clip(inputs.astype(np.float64) - radius * np.sign(slope), 0, 1).astype(np.float32)
            for _ in range(60):
                moved = np.where(draw.random(20) < 0.5, target, np.nextafter(target, inputs))
                inside = [
                    abs(Fraction(float(a)) - Fraction(float(b))) <= allowed for a, b in zip(moved, inputs, strict=True)
                ]
                moved = np.where(inside, moved, np.nextafter(moved, inputs))
                logits = in_float32(model, moved, lambda n: draw.permutation(n))
                flipped |= bool(logits[1 - label] >= logits[label])
                exact = exactly(model, [Fraction(float(v)) for v in moved])
                flipped |= exact[1 - label] >= exact[label]
            assert not (flipped and arithmetic == "float32"), seed
            flips_without += flipped
    assert flips_without > 0  # the search does find what bounds without error terms overlook


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_overflow_or_are_no_numbers_certify_nothing(value: float, method: str) -> None:
    """All comparisons with NaN are false: verdicts ask for what must be true."""
    model, x = mlp(4, 6, 3), images(2, 4)
    with torch.no_grad():
        model[0].weight[0, 0] = value
        model[2].weight[:, 0] = torch.tensor([1.0, -1.0, 2.0])
    for arithmetic in ("float32", "real"):
        bound = Network.of(model, (4,)).margins(
            ball(x, 0.01),
            torch.tensor([0, 1]),
            method=method,
            arithmetic=arithmetic,  # type: ignore[arg-type]
        )
        assert not bool(bound.isnan().any())
        if arithmetic == "float32" or not math.isfinite(value):
            assert not bool((bound > 0).all(1).any())


def test_a_network_verified_in_real_numbers_by_its_size_alone_stays_unknown() -> None:
    """As Zombori et al. (ICLR 2021): a weight so large that a term of 1 vanishes beside it in float32."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e9], [1e9]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        model[2].bias.copy_(torch.tensor([-0.5, 0.0]))
    x = torch.full((1, 1), 0.5)
    assert int(model(x).argmax()) == 1  # in float32; in real numbers it is class 0
    rows = margin_rows(torch.tensor([0]), 2)
    exact = exactly(model, [Fraction(1, 2)])
    assert exact[0] > exact[1]
    for method in METHODS:
        found = Network.of(model, (1,)).margins(ball(x, 1e-6), rows, method=method, arithmetic="float32")  # type: ignore[arg-type]
        assert float(found) < 0


def test_batch_norm_convolutions_and_sums_bound_their_own_float32_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    model[1].running_mean.normal_(0, 5)
    model[1].running_var.uniform_(1e-4, 1)
    model.eval()
    x = images(200, 2, 6, 6)
    network = Network.of(model, (2, 6, 6))
    with torch.no_grad():
        logits = model(x)
    upper_and_lower = torch.cat([torch.eye(3), -torch.eye(3)])[None]
    for method in ("ibp", "crown"):
        found = network.margins(ball(x, 0.0), upper_and_lower, method=method, arithmetic="float32")  # type: ignore[arg-type]
        assert bool((found[:, :3] <= logits).all())
        assert bool((logits <= -found[:, 3:]).all())
        assert float((-found[:, 3:] - found[:, :3]).max()) < 0.1


def test_the_error_of_sums_is_highams() -> None:
    assert gamma(3, 2.0**-24) == pytest.approx(3 * 2.0**-24, rel=1e-6)
    assert gamma(2**24, 2.0**-24) == math.inf
    float32 = Rounding.of("float32", torch.float64)
    assert float32.forward(100) > Rounding.of("real", torch.float64).forward(100) > 0


def test_balls_are_rounded_outwards() -> None:
    x = torch.tensor([[0.1, 0.7]], dtype=torch.float64)
    for eps in (0.1, 1e-17, 0.3):
        interval = Ball(x, torch.tensor([eps], dtype=torch.float64), clip=None).interval(Rounding.of("real", x.dtype))
        for low, high, value in zip(interval.lower[0].tolist(), interval.upper[0].tolist(), x[0].tolist(), strict=True):
            assert Fraction(low) <= Fraction(value) - Fraction(eps)
            assert Fraction(high) >= Fraction(value) + Fraction(eps)


def test_a_box_of_single_points_is_allowed() -> None:
    model, x = mlp(4, 5, 3), images(2, 4).double()
    found = Network.of(model, (4,)).margins(Box(x, x), torch.tensor([0, 1]), arithmetic="real")
    exact = [exactly(model, [Fraction(v) for v in row]) for row in x.tolist()]
    for i, logits in enumerate(exact):
        others = [logits[i] - each for k, each in enumerate(logits) if k != i]
        assert [float(each) for each in others] == pytest.approx(found[i].tolist(), abs=1e-9)
