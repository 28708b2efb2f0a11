"""Bounds of rounding to eight bits: against trying, and against ONNX Runtime's kernels on all levels of two values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bound_oracles import ball
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from int8_files import Node, file, grid, levels_of, pairs, twinned

from trivet.certify.bounds import staircase
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.network import Network
from trivet.certify.bounds.rounding import Rounding
from trivet.certify.bounds.staircase import Dequantised, Levels
from trivet.randomness import generator

FLOAT32 = Rounding.of("float32", torch.float64)


def layers(off: float, low: int, zero: Sequence[float], step: Sequence[float]) -> tuple[Levels, Dequantised]:
    z, s = (torch.tensor(each, dtype=torch.float64) for each in (zero, step))
    return Levels(torch.round, off, off, s, low - z, low + 255 - z, z), Dequantised.of(s, z)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0, -128]), st.booleans())
def test_levels_are_those_found_by_trying_and_lines_lie_on_their_side(seed: int, low: int, same: bool) -> None:
    """Six numbers with a step and a zero each; intervals within range, across its ends and of a step or less."""
    draw = generator(seed, "levels")
    zero = torch.full((6,), 7.0 + low) if same else torch.randint(low, low + 256, (6,), generator=draw).double()
    step = torch.full((6,), 0.3) if same else 0.05 + torch.rand(6, generator=draw, dtype=torch.float64)
    to, back = layers(0.5, low, zero.tolist(), step.tolist())
    middle = (torch.rand(6, generator=draw, dtype=torch.float64) * 400 - 200) * step
    radius = torch.tensor([0.2, 0.9, 3.0, 20.0, 100.0, 300.0], dtype=torch.float64) * step
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None] * radius + middle
    before = Interval((middle - radius)[None], (middle + radius)[None])
    values = to(grid)
    found = to.bounds([before], FLOAT32)
    assert torch.equal(found.lower[0], values.amin(0))
    assert torch.equal(found.upper[0], values.amax(0))
    assert low <= float(values.min()) <= float(values.max()) <= low + 255
    ends = back.bounds([found], FLOAT32)
    assert bool((ends.lower[0] <= back(values)).all() and (back(values) <= ends.upper[0]).all())
    assert bool((ends.upper - ends.lower <= (found.upper - found.lower + 1e-3) * step).all())
    rows = torch.cat([torch.eye(6), -torch.eye(6)])[None].double()
    for slope in ("adaptive", "zero", "one", "same"):
        pulled = to.pull(rows, [before], found, slope, FLOAT32, 5)
        line = (grid @ pulled.rows[0][0].T) + pulled.constant[0]
        assert bool((line <= values @ rows[0].T).all()), slope


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_values_on_the_grid_already_cost_no_rounding(seed: int) -> None:
    """Pooling and reshaping between two roundings to one grid: the second changes nothing, and its lines know."""
    draw = generator(seed, "grid")
    to, _ = layers(0.0, 0, [9.0], [0.25])
    ends = (torch.randint(-60, 1200, (2,), generator=draw) / 4).sort().values
    inside = torch.arange(-9, 247, dtype=torch.float64) * 0.25
    inside = inside[(inside >= ends[0]) & (inside <= ends[1])][:, None]
    if not len(inside):
        return
    before = Interval(ends[:1].double()[None], ends[1:].double()[None])
    known = to.bounds([before], FLOAT32)
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    pulled = to.pull(rows, [before], known, "adaptive", FLOAT32, 5)
    line = inside @ pulled.rows[0][0].T + pulled.constant[0]
    exact = to(inside) @ rows[0].T
    assert bool((line <= exact).all())
    if before.lower.item() in inside and before.upper.item() in inside:
        assert float((exact - line).max()) < 1e-3


def test_slopes_of_a_rectifier_among_the_levels_are_those_asked_for() -> None:
    to, _ = layers(0.5, 0, [0.0], [0.1])
    one = torch.ones(1, 1, 1, dtype=torch.float64)

    def steepness(low: float, high: float, slope: str) -> float:
        before = Interval(*(torch.tensor([[end]], dtype=torch.float64) for end in (low, high)))
        return float(to.pull(one, [before], to.bounds([before], FLOAT32), slope, FLOAT32, 5).rows[0]) * 0.1

    found = {slope: steepness(-3.01, 5.02, slope) for slope in ("adaptive", "zero", "one", "same")}
    assert found["adaptive"] == found["one"] == pytest.approx(1)
    assert found["zero"] == 0
    assert found["same"] == pytest.approx(5 / (3.01 + 4.95), rel=1e-6)
    assert steepness(-5.02, 3.01, "adaptive") == 0
    assert steepness(-5.02, 3.01, "one") == pytest.approx(1)
    assert steepness(0.01, 3.01, "zero") == pytest.approx(1)  # nothing of it is cut off


@pytest.mark.parametrize(
    ("steps", "zeros", "edges"),
    [
        ((0.02, 0.03, 0.05), (129, 14, 101), False),
        ((0.013, 0.9, 1.7), (129, 14, 101), False),
        (
            (0.5, 0.25, 1.0),
            (129, 14, 101),
            True,
        ),  # sums on edges: the kernel adds its odd zero before it rounds to even
        ((0.5 * (1 - 2e-6), 0.25, 1.0), (0, 0, 200), True),  # and so near to them that a float with the zero lies there
    ],
)
def test_every_sum_of_two_levels_is_within_the_bounds_and_the_kernel_rounds_otherwise_than_the_graph(
    steps: tuple[float, float, float], zeros: tuple[int, int, int], edges: bool, tmp_path: Path
) -> None:
    constants = {name: value for part in zip("abc", steps, zeros, strict=True) for name, value in grid(*part).items()}
    model = twinned(pairs([("Add", ["a", "b"], "c", {})], constants), tmp_path)
    assert "QLinearAdd" in model.conditions()[0]
    x = levels_of(constants, "ab")
    with torch.no_grad():
        answers, twin = model(x), model.twin(x)
    found = Network.of(model, (2,)).intervals(ball(x.double(), 0.0, clip=None), "float32")[-1]
    assert bool((found.lower <= answers).all() and (answers <= found.upper).all())
    width = ((found.upper - found.lower) / steps[2]).round()
    assert float(width.max()) <= 1
    assert not (edges and torch.equal(answers, twin))
    assert float(width.mean()) < (0.3 if edges else 0.02)


@pytest.mark.parametrize("seed", range(3))
def test_every_product_sum_of_two_levels_is_within_the_bounds(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    constants: dict[str, Any] = grid("x", 0.1 * rng.random() + 0.01, 100) | grid("c", 10 * rng.random() + 0.5, 77)
    scale = (0.02 * rng.random(3) + 0.001).astype("f4")
    constants |= {"w": rng.integers(-127, 128, (3, 2)).astype("i1"), "sw": scale, "zw": np.zeros(3, "i1")}
    constants |= {"bias": rng.integers(-4000, 4000, 3).astype("i4"), "sb": scale * constants["sx"]}
    nodes: list[Node] = [
        ("QuantizeLinear", ["x", "sx", "zx"], "x1", {}),
        ("DequantizeLinear", ["x1", "sx", "zx"], "x2", {}),
        ("DequantizeLinear", ["w", "sw", "zw"], "w2", {"axis": 0}),
        ("DequantizeLinear", ["bias", "sb"], "b2", {"axis": 0}),
        ("Gemm", ["x2", "w2", "b2"], "c", {"transB": 1}),
        ("QuantizeLinear", ["c", "sc", "zc"], "c1", {}),
        ("DequantizeLinear", ["c1", "sc", "zc"], "y", {}),
    ]
    model = twinned(file(nodes, constants, (2,)), tmp_path)
    assert "QGemm" in model.conditions()[0]
    x = levels_of({"sa": constants["sx"], "za": 100, "sb": constants["sx"], "zb": 100}, "ab")
    with torch.no_grad():
        answers = model(x)
    found = Network.of(model, (2,)).intervals(ball(x.double(), 0.0, clip=None), "float32")[-1]
    assert bool((found.lower <= answers).all() and (answers <= found.upper).all())
    assert float((found.upper > found.lower + float(constants["sc"]) / 2).double().mean()) < 0.01


def test_at_the_edge_of_two_levels_the_runtime_leaves_bounds_for_real_numbers(tmp_path: Path) -> None:
    """The oracle sees roundings: an edge divided by the step is a tie in float32, and no tie in real numbers."""
    constants = grid("a", 0.1, 3) | grid("b", 0.07, 0) | grid("c", 0.1, 3)
    model = twinned(pairs([("Concat", ["a", "a"], "c", {"axis": 1})], constants), tmp_path)
    edges = torch.tensor([(k + 0.5) * 0.1 for k in range(-3, 240)], dtype=torch.float32)
    near = torch.cat([edges, edges.nextafter(torch.tensor(9e9)), edges.nextafter(torch.tensor(-9e9))])
    x = near[:, None].expand(-1, 2)
    with torch.no_grad():
        answers = model(x)
    outside = {}
    for arithmetic in ("real", "float32"):
        found = Network.of(model, (2,)).intervals(ball(x.double(), 0.0, clip=None), arithmetic)[-1]  # type: ignore[arg-type]
        # Of the last product and sum only float32 knows, too: half a step tells levels apart.
        outside[arithmetic] = int(((found.lower > answers + 0.05) | (answers > found.upper + 0.05)).any(1).sum())
    assert outside["real"] > 0
    assert outside["float32"] == 0


def test_the_roundings_allowed_for_are_more_than_the_kernels_have() -> None:
    """Conversion of the sum, two roundings of the scale, the product: 4; sum of levels times ratios, and a zero: 8."""
    assert staircase.ROUNDED >= 8
