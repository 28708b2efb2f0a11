"""Normalisation, smooth activations, softmax, steps, transposed convolutions, more pooling: nothing gets below."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from bound_oracles import ball, images, least_found, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.certify.bounds.curves import Valley, celu, elu, gelu, silu, softplus
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer
from trivet.certify.bounds.network import Network
from trivet.certify.bounds.rounding import Rounding
from trivet.certify.bounds.softmax import Softmax
from trivet.certify.bounds.staircase import Staircase
from trivet.certify.bounds.standardise import Standardise, _inverse_deviation
from trivet.certify.bounds.transposed import TransposedConvolution
from trivet.errors import BadValue
from trivet.randomness import generator

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
TINY = 1e-9
REAL = Rounding.of("real", torch.float64)


class Doing(nn.Module):
    """A function as a layer, with a weight for those that want one."""

    def __init__(self, function: Callable[..., Tensor], *weight: int) -> None:
        super().__init__()
        self.function = function
        if weight:
            self.weight = nn.Parameter(torch.zeros(weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight) if hasattr(self, "weight") else self.function(x)


def between(layer: nn.Module, width: int = 8) -> nn.Module:
    """The layer between dense ones, twice."""
    return nn.Sequential(nn.Linear(6, width), layer, nn.Linear(width, width), layer, nn.Linear(width, 3))


class Attention(nn.Module):
    """Three places of two numbers, mixed by shares that do not depend on each other's products."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.last = nn.Linear(2, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x.view(x.shape[0], 3, 2))
        return self.last((F.softmax(scores, dim=1) + scores.softmax(-1)).flatten(1))


def quantised(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.125, 2, -8, 7)


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: between(nn.GELU()),
    "gelu by tanh": lambda: between(nn.GELU(approximate="tanh")),
    "silu": lambda: between(nn.SiLU()),
    "softplus": lambda: between(nn.Softplus(beta=2.0)),
    "elu": lambda: between(nn.ELU(0.7)),
    "celu": lambda: between(nn.CELU(1.5)),
    "functions": lambda: between(Doing(lambda x: F.gelu(x) + F.silu(x) - F.softplus(x) + F.elu(x) - F.celu(x))),
    "layer norm": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8, bias=False), nn.Linear(8, 3)
    ),
    "rms norm": lambda: between(nn.RMSNorm(8)),
    "norms as functions": lambda: nn.Sequential(
        nn.Linear(6, 8),
        Doing(lambda x, w: F.layer_norm(x, (8,), w) + F.rms_norm(x, (8,), w) + F.group_norm(x, 2, w), 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ),
    "softmax": lambda: between(nn.Softmax(1)),
    "attention": Attention,
    "rounding": lambda: between(Doing(lambda x: torch.round(8 * x) / 8 + (4 * x).floor() / 4 - torch.ceil(x))),
    "quantised": lambda: between(Doing(quantised)),
    "quantised by channel": lambda: between(
        Doing(
            lambda x: torch.fake_quantize_per_channel_affine(
                x, torch.linspace(0.05, 0.2, 8), torch.arange(8, dtype=torch.int32) - 4, 1, -8, 7
            )
        )
    ),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.InstanceNorm2d(4),
        nn.SiLU(), nn.Flatten(), nn.Linear(16, 3),
    ),
    "transposed convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.ReLU(),
        Doing(lambda x, w: F.conv_transpose2d(x, w, dilation=2), 6, 1, 2, 2), nn.Flatten(2),
        nn.ConvTranspose1d(1, 2, 2, stride=2), nn.Flatten(), nn.Linear(144, 3),
    ),
    "pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Unflatten(1, (1, 3)), nn.MaxPool3d((2, 3, 2), (1, 2, 2), (1, 1, 0), ceil_mode=True),
        nn.Flatten(2), nn.MaxPool1d(3, 2, 1), nn.Flatten(), nn.Linear(18, 3),
    ),
}  # fmt: skip


def settled(name: str) -> nn.Module:
    model, draw = (VECTORS | IMAGES)[name](), generator(0, "weights")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (2 / max(tensor[0].numel(), 8)) ** 0.5)
    return model.eval()


def shape_of(name: str) -> tuple[int, ...]:
    return (6,) if name in VECTORS else (2, 6, 6)


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_no_input_found_in_the_ball_is_below_any_bound_and_lines_are_tighter_than_intervals(name: str) -> None:
    model = settled(name).double()
    x, eps = images(2, *shape_of(name), dtype=torch.float64), 0.03
    rows, network = rows_of(model, x).double(), Network.of(model, x.shape[1:])
    # Steps have no gradient to follow: there points are drawn alone.
    worst = least_found(model, x, eps, "L2" if "quantised" in name or name == "rounding" else "Linf", rows, count=25)
    clean = (rows @ model(x)[:, :, None]).squeeze(2).detach()
    found = {}
    for method in METHODS if name == "layer norm" else METHODS[:3]:
        bound = network.margins(ball(x, eps), rows, method=method, arithmetic="real")  # type: ignore[arg-type]
        assert bool((bound <= worst + TINY).all())
        found[method] = bound
    quick = network.margins(ball(x, eps), rows, method="crown-ibp").detach()
    torch.testing.assert_close(quick, found["crown-ibp"], rtol=1e-4, atol=1e-4)
    none = network.margins(ball(x, 0.0), rows, method="crown-ibp", arithmetic="real")
    torch.testing.assert_close(none, clean, rtol=1e-6, atol=1e-6)
    assert float((found["crown"] - found["ibp"]).min()) >= 0
    assert float((found["crown"] - found["ibp"]).mean()) > 0 or name == "pooling"


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_float32_values_lie_within_the_bounds_of_a_point(name: str) -> None:
    model, x = settled(name), images(30, *shape_of(name))
    both = torch.cat([torch.eye(3), -torch.eye(3)])[None]
    with torch.no_grad():
        logits = model(x)
    network = Network.of(model, x.shape[1:])
    for method in ("ibp", "crown-ibp"):
        found = network.margins(ball(x, 0.0), both, method=method, arithmetic="float32")  # type: ignore[arg-type]
        assert bool((found[:, :3] <= logits).all())
        assert bool((logits <= -found[:, 3:]).all())
        width = (-found[:, 3:] - found[:, :3]).amax(1) / logits.abs().amax()
        # A value on the edge of two steps may be rounded either way.
        assert float(width.median()) < 3e-2


def holds(layer: Layer, before: Interval, points: Tensor, draw: torch.Generator) -> None:
    """Intervals and lines, with and without error terms, at `points` [P, B, ...] of the intervals."""
    for rounding in (None, REAL):
        after = layer.bounds([before], rounding)
        rows = torch.randn(len(before.lower), 5, *after.shape[1:], generator=draw, dtype=torch.float64)
        pulled = layer.pull(rows, [before], after, "adaptive", rounding, 1)
        for point in points:
            value = layer(point)
            assert bool((after.lower <= value + TINY).all())
            assert bool((value <= after.upper + TINY).all())
            line = (pulled.rows[0] * point[:, None]).flatten(2).sum(2) + pulled.constant
            assert bool((line <= (rows * value[:, None]).flatten(2).sum(2) + TINY).all())


def boxes(seed: int, *shape: int, scale: float = 1.0) -> tuple[Interval, Tensor, torch.Generator]:
    """Intervals of different widths, some of them points, and corners, ends and insides of them."""
    draw = generator(seed, "boxes")
    low = scale * torch.randn(shape, generator=draw, dtype=torch.float64)
    width = scale * torch.rand(shape, generator=draw, dtype=torch.float64) ** 3 * 3
    width = width * torch.randint(0, 3, shape, generator=draw)
    share = torch.rand(25, *shape, generator=draw, dtype=torch.float64)
    share = torch.where(torch.rand(share.shape, generator=draw) < 0.6, share.round(), share)
    return Interval(low, low + width), low + width * share, draw


CURVES: dict[str, Callable[[], Layer]] = {
    "gelu": gelu,
    "gelu by tanh": lambda: gelu("tanh"),
    "silu": silu,
    "softplus": softplus,
    "softplus that jumps": lambda: softplus(3.0, 1.0),
    "elu": elu,
    "elu with a kink": lambda: elu(0.3),
    "elu that is relu": lambda: elu(0.0),
    "celu": lambda: celu(2.0),
}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(CURVES)), st.floats(-30, 30), st.one_of(st.floats(0, 4), st.floats(0, 80)))
def test_lines_around_curves_hold_on_a_fine_grid(name: str, low: float, width: float) -> None:
    layer = CURVES[name]()
    lower, upper = torch.tensor([[low]], dtype=torch.float64), torch.tensor([[low + width]], dtype=torch.float64)
    grid = torch.linspace(0, 1, 3001, dtype=torch.float64)[:, None, None] * width + low
    grid = torch.minimum(grid, upper)
    before = Interval(lower, upper)
    for rounding in (None, REAL):
        after = layer.bounds([before], rounding)
        value = layer(grid)
        off = 1e-12 * (1 + float(before.size))
        assert float(after.lower) <= float(value.min()) + off
        assert float(value.max()) - off <= float(after.upper)
        for sign in (1.0, -1.0):
            rows = torch.full((1, 1, 1), sign, dtype=torch.float64)
            pulled = layer.pull(rows, [before], after, "adaptive", rounding, 1)
            line = pulled.rows[0].item() * grid + pulled.constant.item()
            assert float((line - sign * value).max()) <= off
            # In the middle no looser than the interval, up to the errors.
            middle = pulled.rows[0].item() * (low + width / 2) + pulled.constant.item()
            worst = float(after.lower if sign > 0 else -after.upper)
            assert middle >= worst - 1e-2 - 1e-9 * (1 + float(before.size))


@pytest.mark.parametrize("name", ["gelu", "gelu by tanh", "silu"])
def test_the_constants_of_curves_are_true(name: str) -> None:
    """By differences of the derivative, which is held against autograd."""
    curve = CURVES[name]()
    assert isinstance(curve, Valley)
    grid = torch.linspace(-40, 40, 200_001, dtype=torch.float64).requires_grad_()
    value = curve(grid)
    (slope,) = torch.autograd.grad(value.sum(), grid, create_graph=True)
    torch.testing.assert_close(curve.derivative(grid), slope, rtol=1e-9, atol=1e-9)
    (bend,) = torch.autograd.grad(slope.sum(), grid)
    assert 0.99 * curve.curvature < float(bend.abs().max()) <= curve.curvature
    grid, value, slope = (each.detach() for each in (grid, value, slope))
    far = grid.abs() >= curve.reach
    assert float((value - grid.relu())[far].abs().max()) <= curve.rest
    left, right = grid < curve.lowest[0], grid > curve.lowest[1]
    assert bool((slope[left] <= 0).all())
    assert bool((slope[right] >= 0).all())
    near = torch.linspace(*curve.lowest, 1001, dtype=torch.float64)
    assert curve.minimum <= float(curve(near).min()) < curve.minimum + 1e-10
    ends = curve.derivative(torch.tensor(curve.lowest, dtype=torch.float64))
    assert float(ends[0]) < 0 < float(ends[1])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.05, 20), st.booleans())
def test_standardised_values_stay_within_intervals_and_lines(seed: int, scale: float, centred: bool) -> None:
    holds(Standardise(1e-3, centred), *boxes(seed, 2, 3, 5, scale=scale))


@pytest.mark.parametrize("seed", range(5))
def test_the_inverse_deviation_lies_between_two_linear_functions(seed: int) -> None:
    before, points, _ = boxes(seed, 2, 3, 4, scale=0.5)
    parts = Standardise(0.1, centred=False)._parts(before, None)
    (below, under), (above, over) = _inverse_deviation(parts)
    for point in [*points, parts.low, parts.high]:
        inverse = (point.square().mean(-1, keepdim=True) + 0.1).rsqrt()
        assert bool(((below * point).sum(-1, keepdim=True) + under <= inverse + TINY).all())
        assert bool((inverse <= (above * point).sum(-1, keepdim=True) + over + TINY).all())


@pytest.mark.parametrize("seed", range(5))
def test_the_range_of_values_by_their_root_mean_square_is_attained(seed: int) -> None:
    """Without centring the values of a box are independent: among ends and zeros are both extremes."""
    before, _, _ = boxes(seed, 1, 1, 4)
    found = Standardise(1e-2, centred=False).bounds([before], None)
    choices = [
        [low, high] + [0.0] * (low < 0 < high)
        for low, high in zip(before.lower[0, 0].tolist(), before.upper[0, 0].tolist(), strict=True)
    ]
    points = torch.tensor(list(itertools.product(*choices)), dtype=torch.float64)[:, None]
    values = Standardise(1e-2, centred=False)(points)
    torch.testing.assert_close(found.lower[0, 0], values.amin((0, 1)))
    torch.testing.assert_close(found.upper[0, 0], values.amax((0, 1)))


def test_no_standardised_value_exceeds_the_root_of_the_others_count() -> None:
    wide = Interval(torch.full((1, 1, 5), -1e3), torch.full((1, 1, 5), 1e3))
    found = Standardise(1e-5).bounds([wide], None)
    assert float(found.upper.max()) <= 2.0001
    assert float(found.lower.min()) >= -2.0001


def test_a_group_whose_variance_float32_cannot_tell_is_unknown() -> None:
    """A mean of 1e4 over differences of 1e-3: evaluation in float32 returns noise."""
    x = 1e4 + 1e-3 * torch.arange(6.0, dtype=torch.float64)[None, None]
    point = Interval(x, x)
    float32 = Standardise(1e-5).bounds([point], Rounding.of("float32", torch.float64))
    assert bool(float32.lower.isinf().all())
    known = Standardise(1e-5).bounds([Interval(x - 1e4, x - 1e4)], Rounding.of("float32", torch.float64))
    assert float((known.upper - known.lower).max()) < 1e-3


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.05, 30))
def test_shares_stay_within_intervals_and_lines(seed: int, scale: float) -> None:
    holds(Softmax(), *boxes(seed, 2, 2, 4, scale=scale))


@pytest.mark.parametrize("seed", range(5))
def test_the_range_of_a_share_is_attained_at_corners(seed: int) -> None:
    before, _, _ = boxes(seed, 1, 1, 4, scale=3.0)
    found = Softmax().bounds([before], None)
    ends = zip(before.lower[0, 0].tolist(), before.upper[0, 0].tolist(), strict=True)
    values = torch.tensor(list(itertools.product(*ends)), dtype=torch.float64).softmax(1)
    torch.testing.assert_close(found.lower[0, 0], values.amin(0))
    torch.testing.assert_close(found.upper[0, 0], values.amax(0))


def test_shares_of_huge_and_unknown_values_are_sound() -> None:
    low = torch.tensor([[[0.0, -800.0, -math.inf]]], dtype=torch.float64)
    high = torch.tensor([[[900.0, -700.0, math.inf]]], dtype=torch.float64)
    known = Softmax().bounds([Interval(low[..., :2], high[..., :2])], REAL)
    assert float(known.lower[0, 0, 0]) > 0.999
    assert float(known.upper[0, 0, 1]) < 1e-3
    rows = torch.eye(2, dtype=torch.float64)[None, :, None]
    pulled = Softmax().pull(rows, [Interval(low[..., :2], high[..., :2])], known, "adaptive", REAL, 1)
    assert bool(pulled.constant.isfinite().all())
    assert bool(Softmax().bounds([Interval(low, high)], REAL).lower.isinf().all())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["round", "floor", "ceil", "grid"]), st.floats(0.1, 5))
def test_steps_stay_within_intervals_and_lines(seed: int, kind: str, scale: float) -> None:
    before, points, draw = boxes(seed, 2, 6, scale=scale)
    step, ends = torch.full((6,), 0.3, dtype=torch.float64), torch.tensor([-5.0, 4.0], dtype=torch.float64)
    layer = {
        "round": Staircase(torch.round, 0.5, 0.5),
        "floor": Staircase(torch.floor, 1.0, 0.0),
        "ceil": Staircase(torch.ceil, 0.0, 1.0),
        "grid": Staircase(torch.round, 0.5, 0.5, step, *ends),
    }[kind]
    holds(layer, before, points, draw)


def on_grid(t: Fraction, step: Fraction, first: int, last: int) -> Fraction:
    """Half to even, exactly; Python's own rounding of fractions."""
    return step * min(max(round(t / step), first), last)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.25, 1 / 3, 2.0**-10]))
def test_quantised_values_of_exact_fractions_lie_within_the_bounds(seed: int, step: float) -> None:
    """Also at ties, where a division that is off by a rounding would take the other step."""
    draw = generator(seed, "ties")
    ties = (torch.randint(-12, 12, (1, 6), generator=draw) + 0.5).double() * step
    low = torch.where(torch.rand(1, 6, generator=draw) < 0.5, ties, ties - step * torch.rand(1, 6, generator=draw))
    high = low + torch.randint(0, 3, (1, 6), generator=draw) * step / 2
    layer = Staircase(
        torch.round, 0.5, 0.5, torch.tensor(step, dtype=torch.float64), torch.tensor(-8.0), torch.tensor(7.0)
    )
    before = Interval(low, high)
    after = layer.bounds([before], REAL)
    pulled = layer.pull(torch.eye(6, dtype=torch.float64)[None], [before], after, "adaptive", REAL, 1)
    for i in range(6):
        ends = Fraction(low[0, i].item()), Fraction(high[0, i].item())
        for t in (*ends, sum(ends) / 2, Fraction(ties[0, i].item())):
            if not ends[0] <= t <= ends[1]:
                continue
            exact = on_grid(t, Fraction(step), -8, 7)
            assert Fraction(after.lower[0, i].item()) <= exact <= Fraction(after.upper[0, i].item())
            line = Fraction(pulled.rows[0][0, i, i].item()) * t + Fraction(pulled.constant[0, i].item())
            assert line <= exact


def test_lines_around_many_steps_follow_them_and_those_of_one_step_are_flat() -> None:
    layer, ones = Staircase(torch.round, 0.5, 0.5), torch.ones(1, 1, 1, dtype=torch.float64)
    for low, high, slope in ((-20.2, 30.1, 1.0), (0.6, 1.4, 0.0)):
        ends = (torch.tensor([[each]], dtype=torch.float64) for each in (low, high))
        before = Interval(*ends)
        pulled = layer.pull(ones, [before], layer.bounds([before], None), "adaptive", None, 1)
        assert pulled.rows[0].item() == slope


def test_float32_may_take_the_next_step_at_a_tie_and_the_bounds_know() -> None:
    """0.35 / 0.1 is 3.5 or 3.4999998 in float32, by how it is computed."""
    step, x = torch.tensor(0.1), torch.tensor([[0.35]])
    bound = Staircase(torch.round, 0.5, 0.5, step.double(), torch.tensor(-8.0), torch.tensor(7.0)).bounds(
        [Interval(x.double(), x.double())], Rounding.of("float32", torch.float64)
    )
    assert float(bound.lower) < 0.3001
    assert float(bound.upper) > 0.3999


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(0, 2),
    st.sampled_from([1, 2]), st.integers(1, 3),
)  # fmt: skip
def test_a_transposed_convolution_is_its_matrix(
    axes: int, kernel: int, stride: int, padding: int, left: int, groups: int, dilation: int
) -> None:
    left = min(left, max(stride, dilation) - 1)
    draw = generator(0, "transposed", axes, kernel, stride)
    weight = torch.randn(4, 3, *[kernel] * axes, generator=draw, dtype=torch.float64)
    layer = TransposedConvolution(
        weight, None, (stride,) * axes, (padding,) * axes, (left,) * axes, groups, (dilation,) * axes
    )
    x = torch.randn(1, 4, *[4] * axes, generator=draw, dtype=torch.float64)
    out = layer(x)
    if not out.numel():
        return
    matrix = torch.func.jacrev(layer.linear)(x).reshape(out.numel(), x.numel())
    rows = torch.randn(3, *out.shape[1:], generator=draw, dtype=torch.float64)
    (found,) = layer.transposed(rows, [x.shape[1:]])
    torch.testing.assert_close(found.flatten(1), rows.flatten(1) @ matrix)
    size = torch.rand(x.shape, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(layer.spread(size).flatten(), matrix.abs() @ size.flatten())
    assert int((matrix != 0).sum(1).max()) < layer.operations
    gain = torch.rand(x.shape, generator=draw, dtype=torch.float64)
    for norm, order in (("L2", 2), ("L1", math.inf)):
        norms = layer.row_norms(gain, norm)  # type: ignore[arg-type]
        exact = torch.linalg.vector_norm(matrix * gain.flatten(), ord=order, dim=1)
        assert norms is not None
        assert bool((norms.flatten() >= exact - 1e-12).all())
        if norm == "L2":
            torch.testing.assert_close(norms.flatten(), exact)


def test_intervals_of_a_transposed_convolution_contain_the_exact_ones_and_hardly_more() -> None:
    draw = generator(1, "exact")
    weight, bias = torch.randn(2, 1, 3, generator=draw).double(), torch.randn(1, generator=draw).double()
    layer = TransposedConvolution(weight, bias, (2,), (1,), (1,), 1, (1,))
    before, _, _ = boxes(1, 1, 2, 4)
    found = layer.bounds([before], REAL)
    least, most = ([Fraction(bias.item())] * found.shape[-1] for _ in range(2))
    for channel, place, tap in itertools.product(range(2), range(4), range(3)):
        at = 2 * place - 1 + tap
        if 0 <= at < found.shape[-1]:
            w = Fraction(weight[channel, 0, tap].item())
            ends = sorted(w * Fraction(each[0, channel, place].item()) for each in (before.lower, before.upper))
            least[at], most[at] = least[at] + ends[0], most[at] + ends[1]
    for low, high, small, large in zip(
        found.lower[0, 0].tolist(), found.upper[0, 0].tolist(), least, most, strict=True
    ):
        assert Fraction(low) <= small <= large <= Fraction(high)
        assert high - low <= float(large - small) + 1e-11


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Softplus(beta=-1.0), "beta=-1.0 has no bounds"),
        (nn.CELU(-0.5), "alpha=-0.5 has no bounds"),
        (nn.Softmax(0), "compares the records of a batch"),
        (Doing(lambda x: torch.softmax(x, 1, torch.float64)), "keep its type"),
        (nn.LayerNorm(1), "normalises"),
        (nn.GroupNorm(6, 6), "normalises single values"),
        (nn.InstanceNorm1d(6, track_running_stats=True), "running statistics has no bounds"),
        (nn.MaxPool1d(2, return_indices=True), "asks for the positions"),
        (Doing(lambda x: x.round(decimals=1)), "unknown way"),
    ],
)
def test_what_has_no_bounds_is_refused_with_the_reason(layer: nn.Module, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        Network.of(nn.Sequential(layer), (6,))
