"""IBP, CROWN-IBP, CROWN and alpha-CROWN against exact minima, linear programmes, closed forms and each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from bound_oracles import (
    attacked,
    ball,
    exact_minimum,
    images,
    least_found,
    margins_of,
    mlp,
    points_in,
    rows_of,
    triangle_minimum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from trivet.certify.bounds.activations import Lines, Rectifier
from trivet.certify.bounds.affine import Linear
from trivet.certify.bounds.interval import Ball, Box
from trivet.certify.bounds.network import Network, margin_rows
from trivet.errors import BadValue
from trivet.randomness import generator

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
SLOPES = ("adaptive", "zero", "one", "same")
TINY = 1e-9


def small(seed: int) -> tuple[nn.Sequential, Tensor]:
    return mlp(3, 4, 3, 3, seed=seed), images(1, 3, seed=seed)


@cache
def exact_margins(seed: int, eps: float) -> Tensor:
    """Of `small(seed)`, [1, 2]."""
    model, x = small(seed)
    low, high = (x[0] - eps).clamp(0, 1).double().numpy(), (x[0] + eps).clamp(0, 1).double().numpy()
    return torch.tensor([[exact_minimum(model, low, high, row) for row in rows_of(model, x)[0].double().numpy()]])


def soundly_below_the_exact_minimum(seeds: range = range(4), eps: float = 0.3) -> None:
    """Every bound of every method lies below the exact minimum; raises AssertionError else."""
    for seed in seeds:
        model, x = small(seed)
        for method in METHODS:
            for slope in SLOPES:
                found = margins_of(model, x, eps, method, slope=slope)
                assert bool((found <= exact_margins(seed, eps) + 1e-7).all()), (seed, method, slope)


def test_every_bound_is_below_the_exact_minimum_over_all_activation_patterns() -> None:
    soundly_below_the_exact_minimum()


def _lines_with(change: Callable[[Lines], Lines]) -> Callable[..., Lines]:
    right = Rectifier.lines

    def wrong(self: Rectifier, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        return change(right(self, lower, upper, slope))

    return wrong


MUTANTS = {
    "the chord starts at the wrong end": _lines_with(
        lambda lines: Lines(lines.lower_slope, None, lines.upper_slope, torch.zeros_like(lines.upper_offset))
    ),
    "the upper line is too flat": _lines_with(
        lambda lines: Lines(lines.lower_slope, None, 0.7 * lines.upper_slope, lines.upper_offset)
    ),
    "the lower slope is above 1": _lines_with(
        lambda lines: Lines(lines.lower_slope + 0.3, None, lines.upper_slope, lines.upper_offset)
    ),
    "upper and lower line are exchanged": _lines_with(
        lambda lines: Lines(lines.upper_slope, lines.upper_offset, lines.lower_slope, 0 * lines.upper_offset)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_lines_of_rectifiers_are_found_out(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rectifier, "lines", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        soundly_below_the_exact_minimum()


def test_signed_weights_in_place_of_their_sizes_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "spread", Linear.linear)
    with pytest.raises(AssertionError):
        soundly_below_the_exact_minimum()


def test_methods_are_ordered_up_to_the_linear_programme_and_the_exact_minimum() -> None:
    eps = 0.3
    strict = {"crown": 0, "alpha-crown": 0}
    for seed in range(4):
        model, x = small(seed)
        network, domain, rows = Network.of(model, (3,)), ball(x, eps), rows_of(model, x)
        known = network.intervals(domain, "real", method="crown")
        found = {method: network.margins(domain, rows, method=method, arithmetic="real") for method in METHODS}
        assert bool((found["ibp"] <= found["crown"] + TINY).all())
        assert bool((found["crown"] <= found["alpha-crown"] + TINY).all())
        strict["crown"] += int((found["crown"] > found["ibp"] + 1e-3).sum())
        strict["alpha-crown"] += int((found["alpha-crown"] > found["crown"] + 1e-4).sum())
        low, high = (x[0] - eps).clamp(0, 1).double().numpy(), (x[0] + eps).clamp(0, 1).double().numpy()
        before = [(known[node].lower[0], known[node].upper[0]) for _, node in network.activations]
        for s, row in enumerate(rows[0].double().numpy()):
            programme = triangle_minimum(model, low, high, row, before)
            assert float(found["alpha-crown"][0, s]) <= programme + 1e-7
            assert programme <= float(exact_margins(seed, eps)[0, s]) + 1e-7
    assert min(strict.values()) > 0  # the order is no equality


def test_same_slopes_are_the_closed_form_of_fast_lin() -> None:
    """Two layers: -<|N|, d l> of Wong & Kolter's dual with N = min(C W2, 0) and slopes d = u / (u - l) both ways."""
    model, x, eps = mlp(5, 7, 3, seed=3), images(3, 5), 0.2
    first, second = (layer for layer in model if isinstance(layer, nn.Linear))
    rows, domain = rows_of(model, x).double(), ball(x.double(), eps, clip=None)
    W1, b1, W2, b2 = (each.detach().double() for each in (first.weight, first.bias, second.weight, second.bias))
    z = x.double() @ W1.T + b1
    low, high = z - eps * W1.abs().sum(1), z + eps * W1.abs().sum(1)
    d = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
    offset = torch.where((low < 0) & (high > 0), -low * d, 0.0)
    N = rows @ W2
    A = (N * d[:, None]) @ W1
    constant = rows @ b2 + (N * d[:, None]) @ b1 + (N.clamp(max=0) * offset[:, None]).sum(2)
    expected = (A @ x.double()[:, :, None]).squeeze(2) - eps * A.abs().sum(2) + constant
    found = Network.of(model, (5,)).margins(domain, rows, method="crown-ibp", slope="same", arithmetic="real")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("norm", "order"), [("Linf", 1), ("L2", 2), ("L1", torch.inf)])
def test_linear_networks_are_bounded_exactly(method: str, norm: str, order: float) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x, eps = images(4, 6, dtype=torch.float64), 0.1
    rows = rows_of(model, x).double()
    A = rows @ model[1].weight @ model[0].weight
    margins = (rows @ model(x)[:, :, None]).squeeze(2)
    expected = margins - eps * torch.linalg.vector_norm(A, ord=order, dim=2)
    torch.testing.assert_close(margins_of(model, x, eps, method, norm=norm, clip=None), expected)
    clipped = margins_of(model, x, eps, method, norm=norm)
    assert bool((clipped >= expected - TINY).all())
    assert norm != "Linf" or bool((clipped > expected + 1e-4).any())


@pytest.mark.parametrize("method", METHODS)
def test_with_no_radius_every_bound_is_the_margin(method: str) -> None:
    model, x = mlp(6, 8, 8, 4, seed=1).double(), images(5, 6, dtype=torch.float64)
    margins = (rows_of(model, x).double() @ model(x)[:, :, None]).squeeze(2)
    for norm in ("Linf", "L2", "L1"):
        torch.testing.assert_close(margins_of(model, x, 0.0, method, norm=norm), margins, rtol=1e-9, atol=1e-9)


def test_crown_is_exact_where_all_neurons_are_stable() -> None:
    model, x, eps = mlp(5, 6, 6, 3, seed=2).double(), images(4, 5, dtype=torch.float64), 0.05
    with torch.no_grad():
        model[0].bias += torch.where(torch.arange(6) % 2 == 0, 20.0, -20.0)
        model[2].bias += torch.where(torch.arange(6) % 3 == 0, -90.0, 90.0)
    rows = rows_of(model, x).double()
    network = Network.of(model, (5,))
    for _, node in network.activations:
        interval = network.intervals(ball(x, eps), "real")[node]
        assert not bool(((interval.lower < 0) & (interval.upper > 0)).any())
    slope = torch.stack([torch.func.jacrev(model)(each) for each in x])
    A = rows @ slope
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    middle, radius = (low + high) / 2, (high - low) / 2
    exact = (rows @ model(middle)[:, :, None]).squeeze(2) - (A.abs() @ radius[:, :, None]).squeeze(2)
    for method in ("crown-ibp", "crown", "alpha-crown"):
        torch.testing.assert_close(margins_of(model, x, eps, method), exact)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from(["Linf", "L2", "L1"]), st.floats(0.01, 0.5))
def test_no_input_of_the_ball_has_a_margin_below_its_bound(seed: int, norm: str, eps: float) -> None:
    model, x = mlp(5, 8, 6, 3, seed=seed).double(), images(3, 5, seed=seed, dtype=torch.float64)
    rows = rows_of(model, x).double()
    worst = least_found(model, x, eps, norm, rows, count=100)
    for method in METHODS:
        assert bool((margins_of(model, x, eps, method, norm=norm) <= worst + TINY).all())


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.floats(0.01, 0.3), st.floats(1.0, 2.0))
def test_bounds_fall_as_the_radius_grows(seed: int, eps: float, factor: float) -> None:
    """True of IBP in theory; of CROWN only with slopes that do not jump: zero."""
    model, x = mlp(5, 8, 6, 3, seed=seed), images(3, 5, seed=seed)
    for method, slope in (("ibp", "adaptive"), ("crown-ibp", "zero")):
        near, far = (margins_of(model, x, each, method, slope=slope) for each in (eps, eps * factor))
        assert bool((far <= near + 1e-9).all())


def test_lines_are_below_the_margins_everywhere_in_the_ball_and_their_minimum_is_the_bound() -> None:
    model, x, eps = mlp(5, 8, 6, 3, seed=7).double(), images(3, 5, dtype=torch.float64), 0.2
    network, domain, rows = Network.of(model, (5,)), ball(x, eps), rows_of(model, x).double()
    for method in ("crown-ibp", "crown", "alpha-crown"):
        slopes, constants = network.lines(domain, rows, method=method, arithmetic="real")
        assert slopes.shape == (3, 2, 5)
        for inputs in points_in(x, eps, "Linf", 50):
            line = (slopes * inputs[:, None]).sum(2) + constants
            assert bool((line <= (rows @ model(inputs)[:, :, None]).squeeze(2) + TINY).all())
        low, high = (x - eps).clamp(0, 1)[:, None], (x + eps).clamp(0, 1)[:, None]
        least = torch.where(slopes > 0, slopes * low, slopes * high).sum(2) + constants
        bound = network.margins(domain, rows, method=method, arithmetic="real")
        assert bool((bound >= least - TINY).all())


def test_intervals_contain_what_neurons_take_on_and_crown_tightens_them() -> None:
    model, x, eps = mlp(5, 10, 10, 10, 3, seed=4).double(), images(3, 5, dtype=torch.float64), 0.2
    network, domain = Network.of(model, (5,)), ball(x, eps)
    rough, tight, tightest = (
        network.intervals(domain, "real", method=method) for method in ("ibp", "crown", "alpha-crown")
    )
    for inputs in points_in(x, eps, "Linf", 100):
        values = inputs
        for node, layer in enumerate(model, 1):
            values = layer(values)
            for intervals in (rough, tight, tightest):
                assert bool((intervals[node].lower <= values + TINY).all())
                assert bool((values <= intervals[node].upper + TINY).all())
    widths = [sum(float((each.upper - each.lower).sum()) for each in found) for found in (rough, tight, tightest)]
    assert widths[0] > 1.2 * widths[1] > 1.2 * widths[2] * 1.0001
    again = network.intervals(domain, "real", method="crown", known=tight)
    assert all(bool((a.lower >= b.lower).all()) for a, b in zip(again, tight, strict=True))


def test_assumed_signs_bound_the_part_of_the_ball_where_they_hold_and_multipliers_help() -> None:
    model, x, eps = mlp(4, 8, 6, 3, seed=5).double(), images(2, 4, dtype=torch.float64), 0.4
    network, domain, rows = Network.of(model, (4,)), ball(x, eps), rows_of(model, x).double()
    _, node = network.activations[1]
    known = network.intervals(domain, "real", method="crown")
    unstable = (known[node].lower < -0.05) & (known[node].upper > 0.05)
    assert bool(unstable.any(1).all())
    neuron = unstable.double().argmax(1)
    better = 0
    for side in (1, -1):
        signs = {node: torch.zeros(2, 6).scatter(1, neuron[:, None], float(side))}
        split = network.intervals(domain, "real", known=known, signs=signs)
        bounds = {
            method: network.margins(domain, rows, method=method, arithmetic="real", intervals=split, signs=signs)
            for method in ("crown", "alpha-crown")
        }
        without = network.margins(domain, rows, method="alpha-crown", arithmetic="real", intervals=split)
        better += int((bounds["alpha-crown"] > without + 1e-3).sum())
        for inputs in points_in(x, eps, "Linf", 300):
            before = model[:3](inputs).gather(1, neuron[:, None]).squeeze(1)
            inside = before * side >= 0
            values = (rows @ model(inputs)[:, :, None]).squeeze(2)
            for bound in bounds.values():
                assert bool(((bound <= values + TINY) | ~inside[:, None]).all())
    assert better > 0


def test_a_contradiction_of_signs_is_no_error() -> None:
    model, x = mlp(3, 4, 2, seed=1), images(1, 3)
    network = Network.of(model, (3,))
    _, node = network.activations[0]
    sure = network.intervals(ball(x, 0.01), "real")[node]
    signs = {node: torch.where(sure.lower > 0, -1.0, 1.0)}
    found = network.margins(ball(x, 0.01), torch.tensor([0]), method="crown", arithmetic="real", signs=signs)
    assert bool(found.isfinite().all())


def test_any_box_will_do() -> None:
    """As the inputs of a collision avoidance network, that lie in about [-0.6, 0.6]."""
    model = mlp(5, 8, 8, 5, seed=6).double()
    draw = generator(0, "boxes")
    low = torch.rand(4, 5, generator=draw, dtype=torch.float64) * 2 - 1
    high = low + 0.2 * torch.rand(4, 5, generator=draw, dtype=torch.float64)
    rows = margin_rows(torch.arange(4), 5).double()
    for method in METHODS:
        bound = Network.of(model, (5,)).margins(Box(low, high), rows, method=method, arithmetic="real")
        for _ in range(100):
            inputs = low + (high - low) * torch.rand(low.shape, generator=draw, dtype=torch.float64).round(decimals=0)
            assert bool((bound <= (rows @ model(inputs)[:, :, None]).squeeze(2) + TINY).all())
    network = Network.of(model.float(), (5,))
    for wrong, message in (
        (Box(high, low), "must not lie above"),
        (Box(low, torch.full_like(high, torch.nan)), "finite ends"),
        (Box(low, torch.full_like(high, torch.inf)), "finite ends"),
    ):
        for arithmetic in ("float32", "real"):
            with pytest.raises(BadValue, match=message):
                network.margins(wrong, rows, arithmetic=arithmetic)  # type: ignore[arg-type]


def test_clipping_to_the_pixels_range_never_loosens_interval_bounds() -> None:
    model, x = mlp(6, 8, 8, 3, seed=2), images(6, 6)
    for norm in ("Linf", "L2", "L1"):
        clipped, free = (margins_of(model, x, 0.3, "ibp", norm=norm, clip=clip) for clip in ((0.0, 1.0), None))
        assert bool((clipped >= free - TINY).all())
        assert norm == "L1" or bool((clipped > free + 1e-4).any())


@pytest.mark.parametrize("method", METHODS)
def test_the_ball_reaches_the_output(method: str) -> None:
    """A perturbation that is not attached would leave every bound at the margin, whatever the radius."""
    model, x = mlp(6, 8, 8, 3, seed=2), images(6, 6)
    bounds = [margins_of(model, x, eps, method) for eps in (0.0, 0.02, 0.1)]
    assert bool((bounds[0] > bounds[1]).all())
    assert bool((bounds[1] > bounds[2]).all())


def test_balls_that_are_none_are_refused() -> None:
    x, eps = images(2, 3), torch.tensor([0.1, 0.1])
    network = Network.of(mlp(3, 4, 2), (3,))
    wrong = [(Ball(x + 1, eps), r"inputs must lie in \[0, 1\]"), (Ball(x * torch.nan, eps, clip=None), "must lie in")]
    for value in (-0.1, torch.nan, torch.inf):
        wrong.append((Ball(x, torch.tensor([0.1, value])), "eps must be finite and not negative"))
    for domain, message in wrong:
        for ask in (network.margins, network.lines):
            with pytest.raises(BadValue, match=message):
                ask(domain, torch.tensor([0, 1]), arithmetic="real")  # type: ignore[operator]
        with pytest.raises(BadValue, match=message):
            network.intervals(domain, "real")
    with pytest.raises(BadValue, match=r"eps must be \[2\]"):
        Ball(x, eps[:1])
    with pytest.raises(BadValue, match="norm='L3' must be"):
        Ball(x, eps, "L3")  # type: ignore[arg-type]
    assert network.margins(Ball(x - 5, eps, clip=(-6.0, -3.0)), torch.tensor([0, 1]), arithmetic="real").shape == (2, 1)


def test_labels_stand_for_their_rows_for_few_records_and_for_many() -> None:
    model = mlp(6, 7, 4, seed=8)
    network = Network.of(model, (6,))
    for count in (2, 9):
        x, labels = images(count, 6), torch.arange(count) % 4
        for method in METHODS:
            by_label, by_row = (
                network.margins(ball(x, 0.1), specification, method=method)
                for specification in (labels, margin_rows(labels, 4))
            )
            torch.testing.assert_close(by_label, by_row)


def test_training_gradients_are_those_of_differences() -> None:
    model, x, labels = (
        mlp(6, 7, 5, 3, seed=9, dtype=torch.float64),
        images(5, 6, dtype=torch.float64),
        torch.arange(5) % 3,
    )
    network = Network.of(model, (6,))
    for method in ("ibp", "crown-ibp"):

        def loss(method: str = method) -> Tensor:
            return network.margins(ball(x, 0.1), labels, method=method).square().sum()

        for weight in (model[0].weight, model[2].bias, model[4].weight):
            (gradient,) = torch.autograd.grad(loss(), weight)
            place = (0,) * weight.ndim
            with torch.no_grad():
                values = []
                for step in (1e-6, -2e-6):
                    weight[place] += step
                    values.append(float(loss()))
                weight[place] += 1e-6
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_gradients_of_single_records_by_vmap(method: str) -> None:
    """As private training asks for them."""
    model, x, labels = mlp(6, 7, 5, 3, seed=9), images(4, 6), torch.arange(4) % 3
    network, weight = Network.of(model, (6,)), model[2].weight.detach()

    def loss(weight: Tensor, record: Tensor, label: Tensor) -> Tensor:
        with _reparametrize_module(model, {"2.weight": weight}):
            box = Box((record - 0.1)[None], (record + 0.1)[None])
            return network.margins(box, label[None], method=method).square().sum()  # type: ignore[arg-type]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, labels)
    for i in range(4):
        margins = network.margins(Box(x[i : i + 1] - 0.1, x[i : i + 1] + 0.1), labels[i : i + 1], method=method)  # type: ignore[arg-type]
        (alone,) = torch.autograd.grad(margins.square().sum(), model[2].weight)
        torch.testing.assert_close(each[i], alone)
        assert float(alone.abs().sum()) > 0


def test_weights_are_read_at_every_use() -> None:
    model, x = mlp(4, 5, 3), images(2, 4)
    network, labels = Network.of(model, (4,)), torch.tensor([0, 1])
    before = network.margins(ball(x, 0.1), labels, method="ibp")
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    after = network.margins(ball(x, 0.1), labels, method="ibp")
    torch.testing.assert_close(after, Network.of(model, (4,)).margins(ball(x, 0.1), labels, method="ibp"))
    assert not torch.allclose(before, after)


def test_specifications_of_other_shapes_are_refused() -> None:
    network, x = Network.of(mlp(4, 5, 3), (4,)), images(2, 4)
    with pytest.raises(BadValue, match=r"specification must be \[2, S, 3\]"):
        network.margins(ball(x, 0.1), torch.zeros(2, 2, 4))
    with pytest.raises(BadValue, match="interval bounds are no lines"):
        network.lines(ball(x, 0.1), torch.tensor([0, 1]), method="ibp")
    with pytest.raises(BadValue, match="slope='steep' must be"):
        network.margins(ball(x, 0.4), torch.tensor([0, 1]), slope="steep")  # type: ignore[arg-type]


def test_attacks_come_near_enough_to_bounds_for_the_comparison_to_mean_something() -> None:
    """Of a stable network the attack reaches the bound: the oracles above can see a bound that is a little too high."""
    model, x, eps = mlp(5, 6, 3, seed=2).double(), images(4, 5, dtype=torch.float64), 0.05
    with torch.no_grad():
        model[0].bias += 20
    rows = rows_of(model, x).double()
    np.testing.assert_allclose(attacked(model, x, eps, rows), margins_of(model, x, eps), atol=1e-9)
